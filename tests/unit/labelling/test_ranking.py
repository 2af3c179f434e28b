"""The ranking of policies by people's labels: known answers, ties, policies that never met."""

import math

import numpy as np
import pytest

from tasks.labelling.labels import Label, Question, question_id
from tasks.labelling.ranking import elo_ratings, rank_policies


def labelled(*wins, labeller="ann") -> tuple[list[Question], list[Label]]:
    """A question and a label for each (policy a, policy b, choice), a prompt each."""
    questions, labels = [], []
    for number, (one, other, choice) in enumerate(wins):
        texts = f"prompt {number}", "one", "other"
        questions.append(Question(question_id(*texts), *texts, one, other, "ranking"))
        labels.append(Label(questions[-1].id, labeller, choice))
    return questions, labels


def points(rows) -> dict[str, float | None]:
    return {row.policy: row.elo and round(row.elo.mean, 3) for row in rows}


def test_ten_wins_to_one_are_400_points():
    rows = rank_policies(*labelled(*[("ppo", "sft", "a")] * 10, ("ppo", "sft", "b")))
    assert points(rows) == {"ppo": 400.0, "sft": 0.0}
    ppo, sft = rows
    assert (ppo.comparisons, sft.comparisons) == (11, 11)
    assert ppo.win_rate.mean == pytest.approx(10 / 11)
    assert sft.win_rate is None
    assert ppo.elo.low < 400 < ppo.elo.high


def test_the_side_on_which_a_policy_stands_changes_nothing():
    rows = rank_policies(*labelled(*[("sft", "ppo", "b")] * 10, ("ppo", "sft", "b")))
    assert points(rows) == {"ppo": 400.0, "sft": 0.0}


def test_ties_and_pairs_that_are_both_bad_are_half_wins():
    rows = rank_policies(*labelled(("ppo", "sft", "tie"), ("ppo", "sft", "both_bad"), ("ppo", "sft", "a")))
    assert points(rows)["ppo"] == pytest.approx(400 * math.log10(2), abs=1e-3)  # 2 wins to 1


def test_a_policy_that_never_met_sft_is_ranked_by_way_of_another():
    """Ten to one over PPO, which is ten to one over SFT: the model adds the points."""
    wins = [("ppo", "sft", "a"), ("grpo", "ppo", "a")] * 10 + [("ppo", "sft", "b"), ("grpo", "ppo", "b")]
    rows = rank_policies(*labelled(*wins))
    assert points(rows) == {"grpo": 800.0, "ppo": 400.0, "sft": 0.0}
    assert rows[0].win_rate is None


def test_policies_that_nothing_connects_have_no_rank():
    rows = rank_policies(
        *labelled(("ppo", "sft", "a"), ("ppo", "sft", "b"), ("dpo", "grpo", "a"), ("dpo", "grpo", "b"))
    )
    assert points(rows) == {"ppo": 0.0, "sft": 0.0, "dpo": None, "grpo": None}


def test_without_sft_there_is_no_win_rate_against_it():
    rows = rank_policies(*labelled(*[("ppo", "dpo", "a")] * 10, ("ppo", "dpo", "b")))
    assert points(rows) == {"ppo": 400.0, "dpo": 0.0}, "above the first by name"
    assert [row.win_rate for row in rows] == [None, None]


def test_a_policy_that_never_lost_has_no_finite_rank():
    rows = rank_policies(*labelled(("ppo", "sft", "a"), ("sft", "dpo", "a"), ("sft", "dpo", "a")))
    assert points(rows) == {"ppo": math.inf, "sft": 0.0, "dpo": -math.inf}


def test_what_does_not_count():
    """Skips, models' labels, questions with a known answer, and pairs of one policy."""
    questions, labels = labelled(("ppo", "sft", "skip"), ("ppo", "ppo", "a"))
    others, model = labelled(("dpo", "sft", "a"), labeller="model:judge")
    gold = [Question("gold", "p", "x", "y", "grpo", "sft", "gold", gold="a")]
    assert rank_policies([*questions, *others, *gold], [*labels, *model, Label("gold", "ann", "a")]) == ()


def test_shuffled_names_change_nothing_but_the_names():
    wins = [("ppo", "sft", "a")] * 6 + [("dpo", "sft", "a")] * 3 + [("ppo", "dpo", "b"), ("sft", "ppo", "a")] * 2
    wins += [("sft", "dpo", "a")]
    swap = {"ppo": "zz", "dpo": "aa", "sft": "sft"}
    rows, renamed = (
        rank_policies(*labelled(*found)) for found in (wins, [(swap[a], swap[b], choice) for a, b, choice in wins])
    )
    assert [(swap[row.policy], row.comparisons) for row in rows] == [(row.policy, row.comparisons) for row in renamed]
    for row, other in zip(rows, renamed, strict=True):
        assert row.elo.mean == pytest.approx(other.elo.mean, abs=1e-3)
        assert row.elo.low == pytest.approx(other.elo.low, abs=1e-3)


def test_strengths_that_made_the_labels_are_found_again():
    true = np.array([0.0, 120.0, 300.0])
    chances = 1 / (1 + 10 ** ((true[None] - true[:, None]) / 400))
    wins = 1e6 * chances * (1 - np.eye(3))
    assert elo_ratings(wins, 0) == pytest.approx(true, abs=0.01)


def test_the_interval_is_as_wide_as_the_error_of_a_log_odds():
    """√(1/won + 1/lost) of 80 wins and 40 losses, by the delta method (Agresti 2013, equation 3.1)."""
    row = rank_policies(*labelled(*[("ppo", "sft", "a")] * 80, *[("ppo", "sft", "b")] * 40))[0]
    expected = 2 * 1.96 * math.sqrt(1 / 80 + 1 / 40) * 400 / math.log(10)
    assert row.elo.high - row.elo.low == pytest.approx(expected, rel=0.15)
