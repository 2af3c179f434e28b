"""The stage on models of two layers: its numbers against log-likelihoods summed here, and what it leaves alone."""

import json
import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tasks.config.evaluation import LmEvalParams
from tasks.core.errors import ConfigError, SourceError
from tasks.core.paths import DISABLED_MARKER, Artifacts
from tasks.core.rows import Demonstration, Preference, read_rows
from tasks.lm_eval import lm_eval, load_tasks
from tasks.models.loading import add_lora, load_policy, load_reference, load_tokenizer, save_weights
from tests.conftest import EOS, tiny_model
from tests.support.tiny_stages import LORA, write_inputs

pytest.importorskip("lm_eval")

ROOT = Path(__file__).resolve().parents[2]
PARAMS = LmEvalParams(tasks=("held_out_perplexity", "held_out_preferences"), batch_size=3, limit=17)
"""Seventeen of twenty documents in batches of three: the limit and a last batch that is not full take part."""


@pytest.fixture(autouse=True)
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The task files are the project's own; nothing looks for another machine, or for a cache in the home folder."""
    attempts: list[object] = []

    def refuse(*where: object, **_: object) -> None:
        attempts.append(where)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    monkeypatch.setenv("RLHF_ROOT", str(ROOT))
    yield
    assert not attempts
    assert not (tmp_path / "home").exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PPO's adapter really changes the model; GRPO and DPO are off."""
    root = tmp_path_factory.mktemp("artifacts")
    write_inputs(root)
    policy = add_lora(tiny_model(), LORA, seed=1)
    draw = torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=draw))
    save_weights(policy, root / "ppo")
    for name in ("grpo", "dpo"):
        (root / name / "adapter").mkdir(parents=True)
        (root / name / "adapter" / DISABLED_MARKER).touch()
    return {name: root / name for name in ("base_model", "sft", "ppo", "grpo", "dpo", "prepare", "preferences")}


@pytest.fixture(scope="module")
def out(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_ROOT", str(ROOT))
        return _run(world, tmp_path_factory.mktemp("lm_eval"))


def _run(world: dict[str, Path], out: Path, params: LmEvalParams = PARAMS) -> Path:
    lm_eval(params, 0, Artifacts(**world, out=out))
    return out


def _logprob(model: Any, tokenizer: Any, context: str, text: str) -> float:
    """Σ log p of the text's tokens after the context, or after the end token, in one forward pass without padding."""
    before, after = tokenizer(context).input_ids or [EOS], tokenizer(text).input_ids
    with torch.no_grad():
        logprobs = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(logprobs[place, token].item() for place, token in zip(places, after, strict=True))


@pytest.fixture(params=["sft", "ppo"])
def measured(request: pytest.FixtureRequest, world: dict[str, Path], out: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A policy, loaded anew, with the tokenizer and what the stage says about it."""
    base, sft = world["base_model"], world["sft"]
    model = load_reference(base, sft) if request.param == "sft" else load_policy(base, sft, world["ppo"])
    return model, load_tokenizer(base), json.loads((out / "results.json").read_text())[request.param]


def test_perplexity_is_that_of_log_likelihoods_summed_here(
    measured: tuple[Any, Any, dict[str, Any]], world: dict[str, Path]
) -> None:
    model, tokenizer, results = measured
    rows = read_rows(world["prepare"] / "demonstrations" / "validation.jsonl", Demonstration)[:17]
    texts = [row.prompt + row.response for row in rows]
    nats = -sum(_logprob(model, tokenizer, "", text) for text in texts)
    words = sum(len(f"{text}.".split()) for text in texts)  # the full stop: lm-eval counts an empty word at the end
    letters = sum(map(len, texts))
    found = results["held_out_perplexity"]
    assert found["word_perplexity"] == [pytest.approx(math.exp(nats / words), rel=1e-4), None]
    assert found["byte_perplexity"] == [pytest.approx(math.exp(nats / letters), rel=1e-4), None]
    assert found["bits_per_byte"] == [pytest.approx(nats / letters / math.log(2), rel=1e-4), None]


def test_accuracy_on_pairs_is_how_often_the_chosen_text_is_likelier(
    measured: tuple[Any, Any, dict[str, Any]], world: dict[str, Path]
) -> None:
    model, tokenizer, results = measured
    acc = norm = 0.0
    for row in read_rows(world["preferences"] / "test.jsonl", Preference)[:17]:
        chosen, rejected = (_logprob(model, tokenizer, row.prompt, side) for side in (row.chosen, row.rejected))
        acc += (chosen > rejected) / 17
        norm += (chosen / len(row.chosen) > rejected / len(row.rejected)) / 17
    expected = {"acc": acc, "acc_norm": norm}
    assert all(0 < share < 1 for share in expected.values()), "always the same side would show nothing"
    for metric, share in expected.items():
        error = (share * (1 - share) / 16) ** 0.5
        assert results["held_out_preferences"][metric] == pytest.approx([share, error], abs=1e-6)


def test_policies_that_are_on_stand_in_both_files_and_again_gives_the_same_bytes(
    world: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    again = _run(world, tmp_path / "again")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["metrics.json", "results.json"]
    for name in names:
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    results, metrics = (json.loads((out / name).read_text()) for name in ("results.json", "metrics.json"))
    assert list(results) == list(metrics) == ["sft", "ppo"]
    assert metrics["ppo"]["held_out_preferences.acc"] == results["ppo"]["held_out_preferences"]["acc"][0]
    assert results["sft"]["held_out_perplexity"] != results["ppo"]["held_out_perplexity"]


@pytest.mark.parametrize(
    ("given", "own", "expected"), [(None, None, 0), (2, None, 2), (2, 0, 0), (2, 5, 2), (None, 5, 5)]
)
def test_examples_are_as_many_as_asked_for_unless_the_task_fixes_none(
    given: int | None, own: int | None, expected: int, world: dict[str, Path], tmp_path: Path
) -> None:
    text = (ROOT / "infra" / "lm_eval" / "held_out_preferences.yaml").read_text()
    (tmp_path / "task.yaml").write_text(text + ("" if own is None else f"num_fewshot: {own}\n"))
    params = LmEvalParams(tasks=("held_out_preferences",), batch_size=1, num_fewshot=given)
    with load_tasks(params, tmp_path, [world["preferences"] / "test.jsonl"], 0) as opened:
        assert opened["tasks"]["held_out_preferences"].config.num_fewshot == expected


def test_a_task_reads_what_the_stage_declares_alone_and_says_so_where_it_is_empty(
    world: dict[str, Path], tmp_path: Path
) -> None:
    """Preferences are empty where that stage is off."""
    params = LmEvalParams(tasks=("held_out_perplexity",), batch_size=1)
    tasks = load_tasks(params, ROOT / "infra" / "lm_eval", [world["preferences"] / "test.jsonl"], 0)
    message = r"artifacts/prepare/demonstrations/validation\.jsonl.*check the network, whether"
    with pytest.raises(SourceError, match=message), tasks:
        raise AssertionError("not reached")
    (tmp_path / "preferences").mkdir()
    (tmp_path / "preferences" / "test.jsonl").touch()
    with pytest.raises(
        SourceError, match=r"cannot be read: a file is empty; .*whether the stages that write it are on"
    ):
        _run(world | {"preferences": tmp_path / "preferences"}, tmp_path / "out")


@pytest.mark.slow  # reading the names of all tasks of lm-eval
def test_an_unknown_task_is_named(world: dict[str, Path], tmp_path: Path) -> None:
    params = LmEvalParams(tasks=("held_out_perplexity", "no_such_task"), batch_size=1)
    with pytest.raises(ConfigError, match=r"neither infra/lm_eval nor lm-eval has \['no_such_task'\]"):
        _run(world, tmp_path, params)


def test_without_the_package_the_error_says_how_to_get_it(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"lm_eval is on, .*`pip install -e '\.\[lm-eval\]'`"):
        _run(world, tmp_path)
