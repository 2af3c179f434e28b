"""A stage that is interrupted and run again writes, byte for byte, what it would have written without interruption."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core import tracking
from tasks.core.errors import TrainingError
from tasks.models import hf_training
from tasks.models.checkpoints import COMPLETE_MARKER, mark_complete
from tasks.rl.trainer import RLTrainer
from tests.support import tiny_stages
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


@pytest.mark.parametrize("weights", ["adapter_model", "model"])
@pytest.mark.parametrize("stage", [stage for stage in RUNS if stage != "grpo"])
def test_a_stage_interrupted_in_every_epoch_writes_the_same(
    stage: str,
    weights: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an adapter, and with all parameters."""
    if weights == "model":
        monkeypatch.setattr(tiny_stages, "LORA", None)
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
    assert f"{stage}: goes on from step {3 * EVERY} of" in capsys.readouterr().err
    result, expected = outputs(tmp_path / "out"), outputs(tmp_path / "whole")
    assert result.keys() == expected.keys()
    assert {"history.csv", "metrics.json", f"adapter/{weights}.safetensors"} <= result.keys()
    for name, content in expected.items():
        assert result[name] == content, name
    assert checkpoints(tmp_path) == third, "the last step is not saved: it need not have been checked"


@pytest.mark.parametrize("weights", ["adapter_model", "model"])
def test_an_rl_stage_interrupted_between_updates_writes_the_same(
    weights: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the third of four updates, after its snapshots: their policies are part of the outputs."""
    if weights == "model":
        monkeypatch.setattr(tiny_stages, "LORA", None)
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
    assert {f"policies/0002/adapter/{weights}.safetensors", "history.csv"} <= outputs(tmp_path / "out").keys()
    assert curves.steps["reward/length"] == curves.steps["kl_loss"] == [1, 2, 3, 4], "its curves are whole"
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rollouts] == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    assert all("".join(row["tokens"]) == row["response"] for row in rollouts)


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
    (newest / COMPLETE_MARKER).unlink()  # as a kill in the middle of the last file would leave it
    (newest / "trainer_state.json").write_text((newest / "trainer_state.json").read_text()[:100])
    run("gold_judge", inputs, tmp_path)
    assert f"goes on from step {EVERY} of 20" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole" / "out")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda of: cut(of / "adapter_model.safetensors"),
    "weights gone": lambda of: (of / "adapter_model.safetensors").unlink(),
    "optimiser cut": lambda of: cut(of / "optimizer.pt"),
    "optimiser changed": lambda of: flip(of / "optimizer.pt"),
    "optimiser hostile": lambda of: (of / "optimizer.pt").write_bytes(pickle.dumps(Hostile(of.parent / "ran"))),
    "random state empty": lambda of: (of / "rng_state.pth").write_bytes(b""),
    "scheduler gone": lambda of: (of / "scheduler.pt").unlink(),
    "state cut": lambda of: cut(of / "trainer_state.json"),
    "mark cut": lambda of: cut(of / COMPLETE_MARKER),
    "all gone": lambda of: (shutil.rmtree(of), of.mkdir()),
}


@pytest.fixture(scope="module")
def interrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A run that left two checkpoints, and the outputs of one that was not interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_training, "CHECKPOINT_STEPS", EVERY)
        run("gold_judge", inputs, folder / "whole")
        assert len(run_until(2 * EVERY + 1, "gold_judge", inputs, folder / "part")) == 2
    return folder / "part", outputs(folder / "whole" / "out")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str, interrupted: tuple[Path, dict[str, bytes]], inputs: Path, tmp_path: Path, capsys: Any
) -> None:
    part, expected = interrupted
    folder = Path(shutil.copytree(part, tmp_path / "run"))
    newest = folder / "checkpoints" / f"checkpoint-{2 * EVERY}"
    DAMAGES[damage](newest)
    run("gold_judge", inputs, folder)
    printed = capsys.readouterr().err
    assert f"warning: the checkpoint {newest} is passed over: " in printed
    assert f"goes on from step {EVERY} of 20" in printed
    assert outputs(folder / "out") == expected
    assert not (folder / "checkpoints" / "ran").exists(), "nothing in it may be executed"


def test_without_a_whole_checkpoint_the_training_begins_anew(
    interrupted: tuple[Path, dict[str, bytes]], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, expected = interrupted
    folder = Path(shutil.copytree(part, tmp_path / "run"))
    for checkpoint in (folder / "checkpoints").iterdir():
        cut(checkpoint / "optimizer.pt")
    run("gold_judge", inputs, folder)
    printed = capsys.readouterr().err
    assert "so the training begins anew" in printed
    assert "goes on" not in printed
    assert outputs(folder / "out") == expected


def test_a_hostile_checkpoint_with_a_good_mark_is_refused_in_one_message(
    interrupted: tuple[Path, dict[str, bytes]], inputs: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    newest = folder / "checkpoints" / f"checkpoint-{2 * EVERY}"
    torch.save(Hostile(tmp_path / "ran"), newest / "optimizer.pt")
    mark_complete(newest)
    with pytest.raises(TrainingError, match=r"checkpoint-10 holds more than numbers and tensors.*delete it"):
        run("gold_judge", inputs, folder)
    assert not (tmp_path / "ran").exists()


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
    arguments = hf_training.trainer_arguments(tiny_stages._SFT, seed=0)
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
    output = capsys.readouterr().err
    assert "reward_model: goes on from step 15 of 20" in output
    assert "reward_model, member 1: goes on from step 5 of 20" in output
    assert "member 2: goes on" not in output
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole" / "out")


def test_the_curves_of_members_stand_beside_each_other(inputs: Path, tmp_path: Path) -> None:
    curves = Curves()
    with tracking.active_run(tracking.ActiveRun("reward_model", curves)):
        run_reward_model(inputs, tmp_path, ensemble_size=2)
    assert curves.steps["loss"] == curves.steps["member_1/loss"] == [1, 5, 10, 15, 20]


class Values:
    """A recorder that keeps the held-out losses of a training."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        if "eval_loss" in metrics and step:
            self.losses.setdefault(step, metrics["eval_loss"])

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None: ...

    def log_file(self, path: Path, folder: str | None) -> None: ...


STOPPING = {"early_stopping_patience": 2, "epochs": 10, "learning_rate": 0.1}


@pytest.fixture
def _stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT and the reward model learn their twenty rows by heart, and stop."""
    monkeypatch.setattr(tiny_stages, "_SFT", tiny_stages._SFT.model_copy(update=STOPPING))
    monkeypatch.setattr(tiny_stages, "_REWARD_MODEL", tiny_stages._REWARD_MODEL.model_copy(update=STOPPING))


@pytest.mark.usefixtures("_stopping")
@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_early_stopping_keeps_the_best_weights_and_goes_on_bit_for_bit(
    stage: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = Values()
    (tmp_path / "whole").mkdir()
    with tracking.active_run(tracking.ActiveRun(stage, values)):
        RUNS[stage](inputs, tmp_path / "whole")
    steps, losses = list(values.losses), list(values.losses.values())
    best = losses.index(min(losses))
    assert best == len(losses) - 1 - 2, "two evaluations after the best one"
    assert steps == list(range(EVERY, steps[-1] + 1, EVERY))
    assert steps[-1] < 100, "it must stop before its tenth epoch"
    if stage == "sft":
        metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
        assert metrics["heldout_loss"] == pytest.approx(losses[best], rel=1e-6), "measured with the best weights"
    for step in (steps[best] + 1, steps[-1] - 1):
        run_until(step, stage, inputs, tmp_path)
    capsys.readouterr()
    run(stage, inputs, tmp_path)
    assert "goes on from step" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"loss_type": "kto"}, {"loss_type": "orpo"}, {"loss_type": "simpo", "beta": 2.0}])
def test_the_kin_of_dpo_go_on_bit_for_bit(
    changes: dict[str, Any], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_stages, "_DPO", tiny_stages._DPO.model_copy(update=changes))
    (tmp_path / "whole").mkdir()
    RUNS["dpo"](inputs, tmp_path / "whole")
    for step in (EVERY + 2, 2 * EVERY + 2):
        run_until(step, "dpo", inputs, tmp_path)
    run("dpo", inputs, tmp_path)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
