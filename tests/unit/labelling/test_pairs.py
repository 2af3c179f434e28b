"""Pairs to label: deterministic, never two alike, and where an ensemble disagrees most."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.core.errors import ConfigError, DataError
from tasks.core.rows import Preference, write_rows
from tasks.labelling.labels import question_id
from tasks.labelling.pairs import (
    PolicyResponse,
    by_disagreement,
    check_policies,
    gold_questions,
    load_ensemble_scores,
    make_pairs,
    make_ranking_pairs,
    preference_variance,
    sample_prompts,
    sample_responses,
    with_overlap,
    without_unkeepable,
)
from tests.support.tiny_stages import GENERATION, run_reward_model, write_inputs

RESPONSES = {
    "one": [PolicyResponse("sft", " x"), PolicyResponse("sft", " y"), PolicyResponse("ppo", " z")],
    "alike": [PolicyResponse("sft", " x"), PolicyResponse("ppo", " x "), PolicyResponse("ppo", "  ")],
    "two": [PolicyResponse("sft", " x"), PolicyResponse("ppo", " y")],
}


def test_pairs_come_prompt_by_prompt_and_never_two_alike() -> None:
    pairs = make_pairs(RESPONSES, 10, least=4, seed=0)
    assert [pair.prompt for pair in pairs] == ["one", "two", "one", "one"]
    assert len({pair.id for pair in pairs}) == 4
    for pair in pairs:
        sides = {PolicyResponse(pair.policy_a, pair.response_a), PolicyResponse(pair.policy_b, pair.response_b)}
        assert len(sides & set(RESPONSES[pair.prompt])) == 2
    assert make_pairs(RESPONSES, 10, least=4, seed=0) == pairs
    assert make_pairs(RESPONSES, 2, least=2, seed=0) == pairs[:2]
    with pytest.raises(DataError, match=r"there are 4 pairs to choose from, not 5 \(1 prompts had one response"):
        make_pairs(RESPONSES, 10, least=5, seed=0)


def test_every_pair_of_policies_is_asked_about_alike() -> None:
    written = {
        str(prompt): [
            PolicyResponse(policy, f" {prompt} {policy} {draw}") for policy in ("a", "b", "c") for draw in "xy"
        ]
        for prompt in range(31)
    }
    pairs = make_ranking_pairs(written, 30, least=30, seed=0)
    matches = Counter(frozenset((pair.policy_a, pair.policy_b)) for pair in pairs)
    assert matches == {frozenset(match): 10 for match in ("ab", "ac", "bc")}
    assert len({pair.prompt for pair in pairs}) == 30
    assert {pair.reason for pair in pairs} == {"ranking"}
    assert 0 < sum(pair.policy_a < pair.policy_b for pair in pairs) < 30, "either stands first"


def test_ranking_needs_two_policies_and_different_responses() -> None:
    assert [pair.prompt for pair in make_ranking_pairs(RESPONSES, 5, least=2, seed=0)] == ["one", "two"]
    with pytest.raises(DataError, match="2 of 3 prompts have different responses of two policies, not 3"):
        make_ranking_pairs(RESPONSES, 5, least=3, seed=0)
    one = {"one": [PolicyResponse("sft", " x"), PolicyResponse("sft", " y")]}
    with pytest.raises(DataError, match="--by ranking compares policies, and there is one: name several with --from"):
        make_ranking_pairs(one, 5, least=1, seed=0)


def test_responses_that_no_database_keeps_are_left_out_and_counted() -> None:
    written = RESPONSES | {"three": [PolicyResponse("sft", " x\0"), PolicyResponse("ppo", " y"), *RESPONSES["two"]]}
    kept, skipped = without_unkeepable(written | {"p\0": RESPONSES["two"]})
    assert kept == written | {"three": written["three"][1:], "p\0": []}
    assert skipped == {
        "response: holds a NUL character, which PostgreSQL cannot keep": 1,
        "prompt: holds a NUL character, which PostgreSQL cannot keep": 2,
    }


def test_the_side_that_stands_first_is_random() -> None:
    written = {str(number): RESPONSES["two"] for number in range(40)}
    first = [pair.policy_a for pair in make_pairs(written, 40, least=40, seed=0)]
    assert 10 < first.count("sft") < 30


def test_the_variance_of_what_members_prefer_by_hand() -> None:
    """Two members: σ(ln 3) = ¾ and σ(−ln 3) = ¼, so the variance is (¼)² = 1/16; agreeing members have none."""
    one = torch.tensor([[math.log(3), 2.0], [0.0, 5.0]])
    other = torch.tensor([[0.0, 0.0], [math.log(3), 3.0]])
    assert preference_variance(one, other).tolist() == pytest.approx([1 / 16, 0.0])


def test_disagreement_takes_the_pairs_that_members_dispute_most() -> None:
    def scores(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The second member likes z in another way, and all else as the first."""
        value = torch.tensor([float("xyz".index(text.strip())) for text in responses])
        return torch.stack([value, torch.where(value == 2, -value, value)])

    pairs = make_pairs(RESPONSES, 10, least=2, seed=0)
    chosen = by_disagreement(pairs, 2, scores)
    assert all(" z" in (pair.response_a, pair.response_b) for pair in chosen)
    assert [pair.reason for pair in chosen] == ["disagreement"] * 2
    # y against z: σ(1) and σ(−3); x against z: σ(2) and σ(−2)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = sorted((((s(2) - s(-2)) / 2) ** 2, ((s(1) - s(-3)) / 2) ** 2), reverse=True)
    assert [pair.priority for pair in chosen] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ConfigError, match=r"at least two members: .*reward_model\.ensemble_size=3"):
        by_disagreement(pairs, 2, lambda prompts, responses: scores(prompts, responses)[:1])


def test_about_the_share_overlaps_and_always_the_same() -> None:
    written = {str(number): RESPONSES["two"] for number in range(200)}
    pairs = make_pairs(written, 200, least=200, seed=0)
    twice = with_overlap(pairs, 0.25, seed=0)
    assert 30 < sum(pair.labels_wanted == 2 for pair in twice) < 70
    assert with_overlap(pairs[::-1], 0.25, seed=0) == twice[::-1]
    assert with_overlap(pairs, 0.0, seed=0) == pairs


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
    line = {"prompt": "p", "response_a": "x", "response_b": "y", "gold": "tie"}
    path.write_text(json.dumps(line) + "\n\n")
    (found,) = gold_questions(path, min_margin=3.0, count=5)
    assert (found.id, found.gold, found.reason) == (question_id("p", "x", "y"), "tie", "gold")
    wrong = [(line | {"gold": "c"}, "gold is 'c'"), (line | {"response_a": "\0"}, "response_a: holds a NUL character")]
    for bad, reason in [*wrong, ({}, "neither")]:
        path.write_text(f"{json.dumps(line)}\n\n{json.dumps(bad)}\n")
        with pytest.raises(DataError, match=rf"gold\.jsonl:3: .*{reason}"):
            gold_questions(path, min_margin=3.0, count=5)
    with pytest.raises(DataError, match="does not exist"):
        gold_questions(tmp_path / "none", min_margin=3.0, count=5)


def test_every_policy_is_sampled_twice_for_each_prompt_and_the_same_again(parts: Path) -> None:
    asked = sample_prompts(parts, "train", 5, seed=0)
    assert asked != sample_prompts(parts, "train", 5, seed=1)
    assert len(set(asked)) == 5
    found = sample_responses(["sft", "ppo"], asked, GENERATION, parts, seed=0)
    assert list(found) == asked
    assert all([item.policy for item in own] == ["sft", "sft", "ppo", "ppo"] for own in found.values())
    assert found == sample_responses(["sft", "ppo"], asked, GENERATION, parts, seed=0)


def test_a_run_that_left_no_policy_is_an_error(parts: Path, tmp_path: Path) -> None:
    assert check_policies([], parts) == ["ppo", "sft"]
    assert check_policies(["sft"], parts) == ["sft"]
    with pytest.raises(ConfigError, match=r"no policy in .* to sample from: `rlhf run` first"):
        check_policies([], tmp_path)


@pytest.mark.slow
def test_pairs_are_chosen_where_a_trained_ensemble_disagrees_most(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run_reward_model(tmp_path, tmp_path / "reward_model", ensemble_size=2)
    scores = load_ensemble_scores(tmp_path)
    found = sample_responses(["sft"], sample_prompts(tmp_path, "train", 4, seed=0), GENERATION, tmp_path, seed=0)
    pairs = make_pairs(found, 20, least=2, seed=0)
    chosen = by_disagreement(pairs, 2, scores)
    texts = [[pair.prompt, pair.response_a, pair.response_b] for pair in pairs]
    asked, first, second = (list(column) for column in zip(*texts, strict=True))
    doubt = preference_variance(scores(asked, first), scores(asked, second)).tolist()
    assert [pair.priority for pair in chosen] == pytest.approx(sorted(doubt, reverse=True)[:2], abs=1e-6)
    assert doubt != pytest.approx([doubt[0]] * len(doubt))
