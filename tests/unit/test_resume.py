"""A stage that is interrupted and run again writes, byte for byte, what it would have written without interruption."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.core import tracking
from tasks.core.errors import TrainingError
from tasks.models import hf_training
from tasks.rl.trainer import RLTrainer
from tests.support.tiny_stages import RUNS, run_reward_model, write_inputs

ROOT = Path(__file__).resolve().parents[2]
EVERY = 5
"""Steps between checkpoints here: one falls into each of the two epochs, and one between them."""


class InterruptedRunError(Exception):
    """As if the process were killed."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_training, "CHECKPOINT_STEPS", EVERY)


def outputs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def after_step(number: int, then: Callable[[Any], None]) -> Iterator[None]:
    """Do something to the model at the end of a step."""
    original = hf_training.HistoryCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == number:
            then(kwargs["model"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_training.HistoryCallback, "on_step_end", on_step_end)
        yield


def interrupt(model: Any) -> None:
    raise InterruptedRunError


def run(stage: str, inputs: Path, folder: Path) -> None:
    """Run the stage with checkpoints beside its outputs."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    with tracking.active_run(tracking.ActiveRun(stage, checkpoints=folder / "checkpoints")):
        RUNS[stage](inputs, folder / "out")


def run_until(step: int, stage: str, inputs: Path, folder: Path) -> list[str]:
    """The checkpoints that a run leaves which is interrupted after this step."""
    with after_step(step, interrupt), pytest.raises(InterruptedRunError):
        run(stage, inputs, folder)
    return checkpoints(folder)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("stage", [stage for stage in RUNS if stage != "grpo"])
def test_a_stage_interrupted_in_every_epoch_writes_the_same(
    stage: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    RUNS[stage](inputs, tmp_path / "whole")
    first = run_until(EVERY + 2, stage, inputs, tmp_path)
    assert first == [f"checkpoint-{EVERY}"]
    second = run_until(2 * EVERY + 2, stage, inputs, tmp_path)
    assert second == sorted([*first, f"checkpoint-{2 * EVERY}"])
    third = run_until(3 * EVERY + 2, stage, inputs, tmp_path)
    assert third == sorted([f"checkpoint-{2 * EVERY}", f"checkpoint-{3 * EVERY}"]), "they must not pile up"
    capsys.readouterr()
    run(stage, inputs, tmp_path)
    assert f"{stage}: goes on from step {3 * EVERY} of" in capsys.readouterr().out
    result, expected = outputs(tmp_path / "out"), outputs(tmp_path / "whole")
    assert result.keys() == expected.keys()
    assert {"history.csv", "metrics.json", "adapter/adapter_model.safetensors"} <= result.keys()
    for name, content in expected.items():
        assert result[name] == content, name
    assert checkpoints(tmp_path) == third, "the last step is not saved: it need not have been checked"


def test_an_rl_stage_interrupted_between_updates_writes_the_same(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the third of four updates, after its snapshots: their policies are part of the outputs."""
    (tmp_path / "whole").mkdir()
    RUNS["grpo"](inputs, tmp_path / "whole")
    score = RLTrainer.score

    def interrupted(self: RLTrainer, rollout: Any) -> Any:
        if self.updates_done == 2:
            raise InterruptedRunError
        return score(self, rollout)

    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "score", interrupted)
        with pytest.raises(InterruptedRunError):
            run("grpo", inputs, tmp_path)
    curves = Curves()
    with tracking.active_run(tracking.ActiveRun("grpo", curves, checkpoints=tmp_path / "checkpoints")):
        RUNS["grpo"](inputs, tmp_path / "out")
    assert "grpo: goes on from update 2 of 4" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert {"policies/0002/adapter/adapter_model.safetensors", "history.csv"} <= outputs(tmp_path / "out").keys()
    assert curves.steps["reward/length"] == curves.steps["kl_loss"] == [1, 2, 3, 4], "its curves are whole"
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert not (tmp_path / "checkpoints" / "grpo.pt").exists()


@pytest.mark.slow
def test_killed_three_times_and_still_the_same_run(inputs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.killed_stage", str(inputs), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, expected = outputs(tmp_path / "sft" / "out"), outputs(tmp_path / "sft" / "whole" / "out")
    assert "history.csv" in expected
    assert result == expected


def test_a_checkpoint_cut_short_is_passed_over(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("gold_judge", inputs, tmp_path / "whole")
    run_until(2 * EVERY + 1, "gold_judge", inputs, tmp_path)
    newest = tmp_path / "checkpoints" / f"checkpoint-{2 * EVERY}"
    (newest / hf_training.COMPLETE_MARKER).unlink()  # as a kill in the middle of the last file would leave it
    (newest / "trainer_state.json").write_text((newest / "trainer_state.json").read_text()[:100])
    run("gold_judge", inputs, tmp_path)
    assert f"goes on from step {EVERY} of 20" in capsys.readouterr().out
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole" / "out")


def test_weights_that_are_not_finite_are_never_saved(inputs: Path, tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(float("nan"))

    kept = r"step 10: .*nan.*lower learning_rate; the checkpoint of step 5 is kept"
    with after_step(EVERY + 2, spoil):
        with pytest.raises(TrainingError, match=kept):
            run("gold_judge", inputs, tmp_path)
        with pytest.raises(TrainingError, match=r"lower learning_rate$"):
            RUNS["gold_judge"](inputs, tmp_path / "plain")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-5"]


def test_a_plain_function_writes_no_checkpoint() -> None:
    arguments = hf_training.trainer_arguments(seed=0, batch_size=1, learning_rate=0.1, epochs=1)
    assert arguments["save_strategy"] == "no"


class Curves:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        for name in metrics:
            self.steps.setdefault(name, []).append(step or 0)

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None: ...

    def log_file(self, path: Path, folder: str | None) -> None: ...


@pytest.mark.slow
def test_members_of_an_ensemble_go_on_each_from_its_own_checkpoint(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second of three members: the first repeats what is behind its last checkpoint."""
    monkeypatch.setitem(RUNS, "reward_model", lambda of, out: run_reward_model(of, out, ensemble_size=3))
    run("reward_model", inputs, tmp_path / "whole")
    models: list[Any] = []

    def interrupt_the_second(model: Any) -> None:
        models.append(model)
        if len(models) == 2:
            raise InterruptedRunError

    with after_step(EVERY + 2, interrupt_the_second), pytest.raises(InterruptedRunError):
        run("reward_model", inputs, tmp_path)
    folder = tmp_path / "checkpoints"
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-15"]
    assert [path.name for path in (folder / "member_1").glob("checkpoint-*")] == ["checkpoint-5"]
    capsys.readouterr()
    run("reward_model", inputs, tmp_path)
    output = capsys.readouterr().out
    assert "reward_model: goes on from step 15 of 20" in output
    assert "reward_model, member 1: goes on from step 5 of 20" in output
    assert "member 2: goes on" not in output
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole" / "out")


def test_the_curves_of_members_stand_beside_each_other(inputs: Path, tmp_path: Path) -> None:
    curves = Curves()
    with tracking.active_run(tracking.ActiveRun("reward_model", curves)):
        run_reward_model(inputs, tmp_path, ensemble_size=2)
    assert curves.steps["loss"] == curves.steps["member_1/loss"] == [1, 5, 10, 15, 20]
