"""Which pairs are asked for: deterministic, never two alike, and where an ensemble differs most."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.core.errors import ConfigError, DataError
from tasks.core.rows import Preference, write_rows
from tasks.labelling.labels import question_id
from tasks.labelling.pairs import (
    Written,
    asked_twice,
    at_random,
    by_disagreement,
    gold_questions,
    paired,
    variance,
)

WRITTEN = {
    "one": [Written("sft", " x"), Written("sft", " y"), Written("ppo", " z")],
    "alike": [Written("sft", " x"), Written("ppo", " x "), Written("ppo", "  ")],
    "two": [Written("sft", " x"), Written("ppo", " y")],
}


def test_pairs_come_prompt_by_prompt_and_never_two_alike() -> None:
    pool = paired(WRITTEN, 10, seed=0)
    assert [pair.prompt for pair in pool.pairs] == ["one", "two", "one", "one"]
    assert pool.alike == 1
    assert len({pair.id for pair in pool.pairs}) == 4
    for pair in pool.pairs:
        assert pair.response_a != pair.response_b
        assert Written(pair.policy_a, pair.response_a) in WRITTEN[pair.prompt]
        assert Written(pair.policy_b, pair.response_b) in WRITTEN[pair.prompt]
    assert paired(WRITTEN, 10, seed=0) == pool
    assert at_random(pool, 2) == pool.pairs[:2] == paired(WRITTEN, 2, seed=0).pairs


def test_the_side_that_stands_first_is_random() -> None:
    written = {str(number): WRITTEN["two"] for number in range(40)}
    first = [pair.policy_a for pair in paired(written, 40, seed=0).pairs]
    assert 10 < first.count("sft") < 30


def test_too_few_pairs_are_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"there are 4 pairs to choose from, not 5 \(1 prompts had one response"):
        at_random(paired(WRITTEN, 10, seed=0), 5)


def test_the_variance_of_what_members_prefer_by_hand() -> None:
    """Two members: σ(ln 3) = ¾ and σ(−ln 3) = ¼, so the variance is (¼)² = 1/16; agreeing members have none."""
    one = torch.tensor([[math.log(3), 2.0], [0.0, 5.0]])
    other = torch.tensor([[0.0, 0.0], [math.log(3), 3.0]])
    assert variance(one, other).tolist() == pytest.approx([1 / 16, 0.0])


def test_disagreement_takes_the_pairs_that_members_dispute_most() -> None:
    def scores(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The second member likes z in another way, and all else as the first."""
        value = torch.tensor([float("xyz".index(text.strip())) for text in responses])
        return torch.stack([value, torch.where(value == 2, -value, value)])

    pool = paired(WRITTEN, 10, seed=0)
    chosen = by_disagreement(pool, 2, scores)
    assert all(" z" in (pair.response_a, pair.response_b) for pair in chosen)
    assert [pair.reason for pair in chosen] == ["disagreement"] * 2
    # y against z: σ(1) and σ(−3); x against z: σ(2) and σ(−2)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = sorted((((s(2) - s(-2)) / 2) ** 2, ((s(1) - s(-3)) / 2) ** 2), reverse=True)
    assert [pair.priority for pair in chosen] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ConfigError, match=r"at least two members, and there is one: .*reward_model\.members=3"):
        by_disagreement(pool, 2, lambda prompts, responses: scores(prompts, responses)[:1])


def test_about_the_share_is_asked_twice_and_always_the_same() -> None:
    written = {str(number): WRITTEN["two"] for number in range(200)}
    pairs = paired(written, 200, seed=0).pairs
    twice = asked_twice(pairs, 0.25, seed=0)
    assert 30 < sum(pair.labels_wanted == 2 for pair in twice) < 70
    assert asked_twice(pairs[::-1], 0.25, seed=0) == twice[::-1]
    assert asked_twice(pairs, 0.0, seed=0) == pairs


def test_gold_questions_are_answered_preferences_of_a_large_margin(tmp_path: Path) -> None:
    rows = [Preference(id=str(n), prompt="", chosen=f"c{n}", rejected=f"r{n}", margin=n / 2) for n in range(40)]
    write_rows(tmp_path / "pairs.jsonl", [*rows, Preference(id="x", prompt="", chosen="c", rejected="r")])
    found = gold_questions(tmp_path / "pairs.jsonl", min_margin=3.0, count=30)
    right = [pair.response_a if pair.gold == "a" else pair.response_b for pair in found]
    assert right == [f"c{number}" for number in range(39, 9, -1)]
    assert 6 < sum(pair.gold == "a" for pair in found) < 24
    with pytest.raises(DataError, match=r"no line of 41 has a margin of 20 or more; lower --gold-margin"):
        gold_questions(tmp_path / "pairs.jsonl", min_margin=20.0, count=5)


def test_a_line_ends_where_json_lines_say(tmp_path: Path) -> None:
    row = Preference(id="1", prompt="", chosen="x\u2028y", rejected="z\x85q", margin=3.0)
    write_rows(tmp_path / "pairs.jsonl", [row])
    (found,) = gold_questions(tmp_path / "pairs.jsonl", min_margin=3.0, count=5)
    assert {found.response_a, found.response_b} == {row.chosen, row.rejected}


def test_gold_questions_can_be_written_down(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y", "gold": "tie"}) + "\n\n")
    (found,) = gold_questions(path, min_margin=3.0, count=5)
    assert (found.id, found.gold, found.reason) == (question_id("p", "x", "y"), "tie", "gold")
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y", "gold": "c"}) + "\n")
    with pytest.raises(DataError, match=r"gold\.jsonl:3: .*gold is 'c'"):
        gold_questions(path, min_margin=3.0, count=5)
    path.write_text(json.dumps({"prompt": "p", "response_a": "x\0", "response_b": "y", "gold": "a"}))
    with pytest.raises(DataError, match=r"gold\.jsonl:1: response_a: holds a NUL character"):
        gold_questions(path, min_margin=3.0, count=5)
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"gold\.jsonl:1: neither"):
        gold_questions(path, min_margin=3.0, count=5)
    with pytest.raises(DataError, match="does not exist"):
        gold_questions(tmp_path / "none", min_margin=3.0, count=5)
