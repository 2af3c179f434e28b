"""The losses, against numbers worked by hand from the scores of the untrained model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.rows import Preference
from tasks.models.hf_training import HistoryCallback, train_or_resume
from tasks.models.loading import add_lora, init_process, new_reward_model
from tasks.rewards.scorers import TextScorer
from tasks.rewards.training import TrainingData, make_trainer
from tests.conftest import letter_tokenizer, tiny_model
from tests.support.tiny_stages import LORA


class Config:
    """All rows in one batch, one step."""

    epochs, batch_size, learning_rate, max_length, max_cut_share = 1, 3, 0.01, 32, 0.1
    lr_scheduler, warmup_share, weight_decay, trl, early_stopping_patience = "linear", 0.0, 0.0, {}, None


ROWS = [
    Preference(id="1", prompt="a", chosen=" bcd", rejected=" e", margin=1.5, objective="kind"),
    Preference(id="2", prompt="", chosen="ff", rejected="gg", margin=-2.0, objective="short"),
    Preference(id="3", prompt="b", chosen="hij", rejected="kk", objective="kind"),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def fresh(base: Path, heads: int = 1) -> Any:
    scorer = new_reward_model(base, None, seed=1, heads=heads)
    return add_lora(scorer, LORA, seed=1, head="score")


def scores(base: Path, samples: list[tuple[str, str]], heads: int = 1) -> torch.Tensor:
    return TextScorer(fresh(base, heads), letter_tokenizer())(samples)


def first_loss(base: Path, data: TrainingData) -> float:
    init_process()
    history, tokenizer = HistoryCallback("test"), letter_tokenizer()
    data, _ = data.fit(tokenizer, Config, section="reward_model", context=64)  # type: ignore[arg-type]
    trainer = make_trainer(Config, fresh(base, len(data.weights)), tokenizer, data, seed=0, callbacks=[history])
    train_or_resume(trainer)
    return history.rows[0]["loss"]


def sides() -> list[tuple[str, str]]:
    return [(row.prompt, row.chosen) for row in ROWS] + [(row.prompt, row.rejected) for row in ROWS]


def log_loss(gap: float) -> float:
    return math.log1p(math.exp(-gap))


@pytest.mark.parametrize(("scale", "margins"), [(None, (0, 0, 0)), (1.0, (1.5, 0, 0)), (2.0, (3.0, 0, 0))])
def test_a_margin_is_taken_off_the_gap_where_it_is_known_and_agrees(base, scale, margins):
    """−log σ(r_c − r_r − m): m is 1.5 points times the scale; −2 contradicts the label, the third is unknown."""
    values = scores(base, sides())
    gaps = (values[:3] - values[3:]).tolist()
    expected = sum(log_loss(gap - margin) for gap, margin in zip(gaps, margins, strict=True)) / 3
    data = TrainingData({"train": ROWS}, margin_scale=scale)
    assert first_loss(base, data) == pytest.approx(expected, rel=1e-4)


def test_a_pair_trains_the_head_that_it_is_about(base):
    """Two heads: pairs 1 and 3 by the second, pair 2 by the first, as `objectives` orders them."""
    values = scores(base, sides(), heads=2)
    assert values.shape == (6, 2)
    gaps = (values[:3] - values[3:]).tolist()
    expected = (log_loss(gaps[0][1]) + log_loss(gaps[1][0]) + log_loss(gaps[2][1])) / 3
    data = TrainingData({"train": ROWS}, weights={"short": 0.5, "kind": 0.5})
    assert first_loss(base, data) == pytest.approx(expected, rel=1e-4)


def squared_error(value: float, target: float) -> float:
    return (value - target) ** 2


def cross_entropy(value: float, target: float) -> float:
    """Of the log-odds."""
    return log_loss(value if target else -value)


@pytest.mark.parametrize(
    ("loss", "targets", "binary"), [(squared_error, [1.0, -2.0, 0.5], False), (cross_entropy, [1.0, 0.0, 1.0], True)]
)
def test_targets_are_fitted_by_their_loss(base, loss, targets, binary):
    texts = ["abc", "de", "fghij"]
    expected = sum(map(loss, scores(base, [("", text) for text in texts]).tolist(), targets)) / 3
    data = TrainingData(texts={"train": texts}, targets={"train": targets}, binary=binary)
    assert first_loss(base, data) == pytest.approx(expected, rel=1e-4)
