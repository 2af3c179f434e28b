"""The stage at its smallest: one model, and an ensemble whose members are what their seeds make them."""

import json
from pathlib import Path

import pytest
import torch

from tasks.core.rows import Preference, read_rows
from tasks.rewards.reward_model import NORMALISATION, OOD_DETECTOR, MahalanobisOOD, RewardModel, member_folder
from tests.support import tiny_stages
from tests.support.tiny_stages import run_reward_model, write_inputs

HEADER = "category,pairs,accuracy,low,high"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run_reward_model(inputs, out)
    return out


@pytest.fixture(scope="module")
def ensemble(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ensemble")
    run_reward_model(inputs, out, ensemble_size=3)
    return out


def figures(out: Path) -> dict[str, float]:
    return json.loads((out / "metrics.json").read_text())


def test_the_first_member_is_the_model_without_an_ensemble(alone: Path, ensemble: Path) -> None:
    files = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert len(files) == 9
    for file in files:
        if file.name != "metrics.json":
            assert (ensemble / file).read_bytes() == (alone / file).read_bytes(), file
    assert (alone / "challenge.csv").read_text() == f"{HEADER}\n", "random letters are no sentences"
    assert figures(alone).items() <= figures(ensemble).items()
    assert figures(ensemble).keys() - figures(alone) == {"members", "ensemble_accuracy", "mean_member_accuracy"}


def test_a_member_is_what_its_seed_makes_it(inputs: Path, ensemble: Path, tmp_path: Path) -> None:
    run_reward_model(inputs, tmp_path, seed=2)
    assert (member_folder(ensemble, 2) / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert (member_folder(ensemble, 1) / WEIGHTS).read_bytes() != (tmp_path / WEIGHTS).read_bytes()
    assert (member_folder(ensemble, 2) / "history.csv").read_bytes() == (tmp_path / "history.csv").read_bytes()


def test_figures_of_the_ensemble_are_those_of_its_members(inputs: Path, ensemble: Path) -> None:
    model = RewardModel.load(inputs / "base_model", inputs / "sft", ensemble)
    pairs = read_rows(inputs / "preferences" / "test.jsonl", Preference)
    prompts = [row.prompt for row in pairs]
    chosen, rejected = [row.chosen for row in pairs], [row.rejected for row in pairs]
    gaps = model.member_scores(prompts, chosen) - model.member_scores(prompts, rejected)
    found = figures(ensemble)
    assert found["members"] == len(gaps) == 3
    assert found["accuracy"] == pytest.approx((gaps[0] > 0).float().mean().item())
    assert found["mean_member_accuracy"] == pytest.approx((gaps > 0).float().mean().item())
    assert found["ensemble_accuracy"] == pytest.approx((gaps.mean(0) > 0).float().mean().item())
    spreads = {json.loads((member_folder(ensemble, n) / NORMALISATION).read_text())["std"] for n in range(3)}
    assert len(spreads) == 3, "each is normalised by itself"


def test_the_distance_is_measured_on_training_texts_and_bounded_by_validation(inputs: Path, alone: Path) -> None:
    detector = MahalanobisOOD.load(alone / OOD_DETECTOR)
    model = RewardModel.load(inputs / "base_model", inputs / "sft", alone)
    scorer = model.members[0].scorer

    def states(part: str) -> torch.Tensor:
        pairs = read_rows(inputs / "preferences" / f"{part}.jsonl", Preference)
        texts = {(row.prompt, text) for row in pairs for text in (row.chosen, row.rejected)}
        return scorer.scores_and_states(sorted(texts))[1]

    torch.testing.assert_close(detector.mean, states("train").mean(0), rtol=1e-4, atol=1e-5)
    ordered = detector.distances(states("validation")).sort().values
    place = 0.99 * (len(ordered) - 1)
    low, high = ordered[int(place)].item(), ordered[int(place) + 1].item()
    assert detector.threshold == pytest.approx(low + (place - int(place)) * (high - low), rel=1e-4)
    found = figures(alone)
    assert found["ood_threshold"] == detector.threshold
    assert found["ood_share_heldout"] == pytest.approx(detector.is_ood(states("test")).mean().item(), abs=0.05)
    assert 0 <= found["ood_share_sft"] <= 1


def test_all_parameters_are_trained_in_each_member(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage later the members score the held-out pairs as they did when they were trained."""
    monkeypatch.setattr(tiny_stages, "LORA", None)
    run_reward_model(inputs, tmp_path, ensemble_size=2)
    assert (member_folder(tmp_path, 1) / "adapter" / "model.safetensors").is_file()
    model = RewardModel.load(inputs / "base_model", inputs / "sft", tmp_path)
    pairs = read_rows(inputs / "preferences" / "test.jsonl", Preference)
    prompts = [row.prompt for row in pairs]
    chosen, rejected = [row.chosen for row in pairs], [row.rejected for row in pairs]
    gaps = model.member_scores(prompts, chosen) - model.member_scores(prompts, rejected)
    assert figures(tmp_path)["mean_member_accuracy"] == pytest.approx((gaps > 0).float().mean().item())
    assert (gaps[0] - gaps[1]).abs().max() > 1e-3
