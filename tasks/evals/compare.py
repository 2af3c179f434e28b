"""Aggregate scored responses into one row of metrics per policy, and select examples of where policies differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import Field

from tasks.core.errors import DataError
from tasks.core.rows import Row
from tasks.core.text_stats import distinct_n, repetition_rate, word_count
from tasks.evals.controls import Numbers, length_controlled, pair_wins, pass_at_k, subset_win_rate, win_rate_bound
from tasks.evals.statistics import TIE_TOLERANCE, Interval, bootstrap_mean, mean_and_error

__all__ = [
    "BEST_OF_N", "CONTROLS", "DIGITS", "HEADLINE", "HUMAN", "JUDGE_NAMES", "NULL", "REFERENCE", "Example",
    "HackingFinding", "ScoredResponse", "Table", "add_accuracy", "add_null", "by_policy", "compare_controls",
    "compare_policies", "examples_to_dict", "first_draws", "headline", "judges_of", "select_examples", "win_rates_of",
]  # fmt: skip

REFERENCE = "sft"

NULL, BEST_OF_N, HUMAN = CONTROLS = ("null", "best_of_n", "human")
"""Rows that are compared as policies are, and are none: further draws of the reference, the best of n of these by the
proxy, and what a person wrote."""

WIN_RATE_KEYS: Mapping[str, str] = {"gold": "win_rate", "vader": "win_rate_vader", "proxy": "win_rate_proxy"}
"""Judge → prefix of its keys in the table; `judges_of` gives the judges of one table."""

JUDGE_NAMES = {"gold": "gold judge", "judge": "LLM judge", "vader": "VADER", "proxy": "proxy reward"}
"""Display names; the LLM judge compares pairs without a score, so it has a win rate and no gain."""

HEADLINE = (
    "win_rate", "win_rate_low", "win_rate_high", "win_rate_vader", "win_rate_proxy", "reward_gold", "reward_proxy",
    "accuracy_strict", "accuracy_flexible", "vader", "kl", "kl_stderr", "length", "repetition", "distinct_2",
    "truncated_share", "win_rate_judge", "judge_first", "judge_inconsistent", "success", "success_low", "success_high",
    "turns", "win_rate_length_controlled", "win_rate_finished", "win_rate_same_length", "win_rate_bound",
    "accuracy_greedy", "pass_at_2",
)  # fmt: skip
"""Keys of the table that metrics.json repeats for DVC and MLflow; policies.json has all keys."""

DIGITS = 6
"""Decimals kept in tables: finer than any interval here can resolve."""

Table = dict[str, dict[str, float]]
"""Policy → key → number; what the keys mean: `compare_policies`."""


class ScoredResponse(Row):
    """Response of a policy with all its scores and metrics; `id` is `<policy>/<prompt id>/<draw>`."""

    policy: str
    prompt_id: str
    draw: int = Field(default=0, ge=0, description="Number of the policy's response to this prompt, from 0.")
    prompt: str
    response: str = Field(description="Without its end token; carries its own leading space.")
    tokens: int = Field(ge=0, description="Response tokens, the end token included.")
    ended: bool = Field(description="Whether the policy wrote its end token in time.")
    kl: float | None = Field(
        description="Σ over response tokens of log π − log π_ref (k1), nats; of best-of-n the analytic KL; null of a "
        "person's response."
    )
    kl_k3: float | None = Field(description="Σ over tokens of e^(−Δ) − 1 + Δ, Δ = log π − log π_ref (k3), nats.")
    proxy: float = Field(
        description="The reward that training maximised: the weighted sum of the components, discounted over turns."
    )
    rewards: dict[str, float] = Field(description="Each component of the proxy reward, before weighting.")
    gold: float = Field(
        description="The gold judge's predicted mean rating; or 1 for the right answer, 0 for others; or what an "
        "environment paid."
    )
    vader: float | None = Field(description="VADER's compound score, in [−1, 1], where it judges.")
    correct: dict[str, bool] | None = Field(
        default=None,
        description="Where the right answer is known, whether the response gives it: `strict` in the demanded form, "
        "`flexible` as its last number.",
    )
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Metrics of the reward's components about the response, not rewarded."
    )
    conversation: str | None = Field(
        default=None, description="Transcript after the prompt, if an environment answered."
    )

    @property
    def display_text(self) -> str:
        """Transcript of the conversation if there is one, else the response."""
        return self.conversation or self.response

    @property
    def scores(self) -> dict[str, float]:
        """Judge → score, of those that judged."""
        scores = {"gold": self.gold, "vader": self.vader, "proxy": self.proxy}
        return {judge: score for judge, score in scores.items() if score is not None}


@dataclass(frozen=True)
class HackingFinding:
    """A detector that fired: in training, with the first update in which it did, or at evaluation."""

    detector: str
    phase: str
    text: str


def by_policy(records: Sequence[ScoredResponse]) -> dict[str, list[ScoredResponse]]:
    """Group the records by policy, in their order."""
    groups: dict[str, list[ScoredResponse]] = {}
    for record in records:
        groups.setdefault(record.policy, []).append(record)
    return groups


Grid = Sequence[Sequence[ScoredResponse]]
"""[n prompts][m draws]; the prompts are in the order of the reference's."""


def first_draws(records: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """The first response of each policy to each prompt, for whoever reads or judges one a prompt."""
    return [record for record in records if record.draw == 0]


def compare_policies(records: Sequence[ScoredResponse], *, samples: int, seed: int) -> Table:
    """Compute one row of metrics per policy, of whatever name, in the order of the records.

    Each policy has m ≥ 1 draws of each prompt, the reference k; all numbers are means over prompts of the mean over the
    prompt's draws, or over its m · k pairs with the reference.

    Keys: `n` prompts; `reward_proxy`, `reward_gold`, `reward_<component>` means; `win_rate`, `win_rate_vader`,
    `win_rate_proxy` against the reference by the gold judge, VADER and the proxy, each with `_low` and `_high` (95 %
    bootstrap interval over prompts; the reference itself has ½) and `_ties`, the share of equal scores; `gain_gold`,
    `gain_vader`, `gain_proxy` mean difference to the reference in standard deviations of the reference's scores, each
    with `_stderr`; `kl` nats per response with `kl_stderr`, and `kl_k3`; `length` in words, `length_tokens`;
    `repetition`; `distinct_1`, `distinct_2`, of one draw per prompt; `truncated_share`; the mean of each measure under
    its name, such as `ood_share`. Where VADER judges, its mean `vader`.
    Beside the gold judge's win rate, each with `_low`, `_high` and its number of `_pairs`:
    `win_rate_length_controlled`; `win_rate_finished`, of pairs in which both ended; `win_rate_same_length`, of pairs
    whose lengths differ by at most one word. `win_rate_bound`: the highest that is possible at the upper end of the
    KL's 95 % interval. See `tasks.evals.controls`.
    Where right answers are known: `accuracy_strict`, `accuracy_flexible` over those prompts, and, in the flexible
    reading, `pass_at_2`, `pass_at_4`, … up to m, each with `_low` and `_high`.
    Where an environment answered: `success`, the share of conversations that it rewarded, with `_low` and `_high`, and
    the mean number of `turns`; lengths, repetition and the like are then those of the policy's own words.

    Args:
        samples: bootstrap resamples for each interval.

    Raises:
        DataError: the reference is missing, or a policy did not answer exactly the reference's prompts.
    """
    groups = by_policy(records)
    if REFERENCE not in groups:
        raise DataError(f"no responses of {REFERENCE!r}, the policy that all are compared with; found {sorted(groups)}")
    reference = _reference_grid(groups[REFERENCE])
    return {policy: _compare(group, reference, samples, seed) for policy, group in groups.items()}


def _compare(group: Sequence[ScoredResponse], reference: Grid, samples: int, seed: int) -> dict[str, float]:
    """One policy's row, rounded."""
    grid = _to_grid(group, [draws[0].prompt_id for draws in reference])
    row = _policy_metrics(grid) | _shares(grid, samples, seed)
    for judge in reference[0][0].scores:
        row |= _win_rate_metrics(judge, grid, reference, samples, seed)
    if group[0].policy != REFERENCE:
        row |= _control_metrics(grid, reference, samples, seed)
        if "kl" in row:
            row["win_rate_bound"] = win_rate_bound(row["kl"] + 1.96 * row["kl_stderr"])
    return {key: round(value, DIGITS) for key, value in row.items()}


def compare_controls(
    reference: Sequence[ScoredResponse], controls: Sequence[ScoredResponse], *, samples: int, seed: int
) -> Table:
    """Compare each control with the reference, as `compare_policies` does, on the prompts that it has."""
    table: Table = {}
    grid = _reference_grid(reference)
    for name, group in by_policy(controls).items():
        asked = {record.prompt_id for record in group}
        own = [draws for draws in grid if draws[0].prompt_id in asked]
        table[name] = _compare(group, own, samples, seed)
    return table


def add_null(table: Table, controls: Table) -> Table:
    """Add the null's win rate by the gold judge to each policy's row, with `_low` and `_high`: `win_rate_null`."""
    null = controls[NULL]
    rates = {f"win_rate_null{end}": null[f"win_rate{end}"] for end in ("", "_low", "_high")}
    return {policy: row | (rates if policy != REFERENCE else {}) for policy, row in table.items()}


def add_accuracy(table: Table, key: str, correct: Mapping[str, Sequence[float]], *, samples: int, seed: int) -> Table:
    """Add a share of right answers with `_low` and `_high`; `correct`: policy → 1 or 0 for each prompt."""
    return {
        policy: row | (_share(key, correct[policy], samples, seed) if correct.get(policy) else {})
        for policy, row in table.items()
    }


def headline(table: Table) -> Table:
    """Part of the table that metrics.json repeats."""
    return {policy: {key: row[key] for key in HEADLINE if key in row} for policy, row in table.items()}


def judges_of(table: Table) -> dict[str, str]:
    """Judges with scores in this table, with the prefix of their keys."""
    row = next(iter(table.values()))
    return {judge: prefix for judge, prefix in WIN_RATE_KEYS.items() if prefix in row}


def win_rates_of(table: Table) -> dict[str, str]:
    """Judges with a win rate in this table, with the prefix of their keys."""
    known = {judge: WIN_RATE_KEYS.get(judge, f"win_rate_{judge}") for judge in JUDGE_NAMES}
    return {judge: prefix for judge, prefix in known.items() if any(f"{prefix}_low" in row for row in table.values())}


def _reference_grid(reference: Sequence[ScoredResponse]) -> Grid:
    """The reference's records by prompt, in their order, and draw."""
    return _to_grid(reference, list(dict.fromkeys(record.prompt_id for record in reference)))


def _to_grid(group: Sequence[ScoredResponse], prompt_ids: Sequence[str]) -> Grid:
    """The group's records by prompt and draw."""
    by_prompt: dict[str, dict[int, ScoredResponse]] = {}
    for record in group:
        by_prompt.setdefault(record.prompt_id, {})[record.draw] = record
    draws = {len(own) for own in by_prompt.values()}
    if set(by_prompt) != set(prompt_ids) or len(draws) != 1 or len(group) != len(prompt_ids) * max(draws):
        raise DataError(
            f"{group[0].policy} has {len(group)} responses to {len(by_prompt)} prompts; each policy must answer each "
            f"of the {len(prompt_ids)} prompts of {REFERENCE}, all equally often"
        )
    return [[own for _, own in sorted(by_prompt[prompt].items())] for prompt in prompt_ids]


def _matrix(grid: Grid, value: Callable[[ScoredResponse], float]) -> Numbers:
    """[n, m] of a number of each response."""
    return np.array([[value(record) for record in draws] for draws in grid], dtype=np.float64)


def _policy_metrics(grid: Grid) -> dict[str, float]:
    """Metrics of one policy's responses alone; the mean over all of them is that of the means per prompt."""
    group = [record for draws in grid for record in draws]
    row: dict[str, float] = {"n": len(grid)}
    row |= {f"reward_{judge}": fmean(record.scores[judge] for record in group) for judge in ("proxy", "gold")}
    if "vader" in group[0].scores:
        row["vader"] = fmean(record.scores["vader"] for record in group)
    row |= {f"reward_{name}": fmean(record.rewards[name] for record in group) for name in group[0].rewards}
    row |= {name: fmean(record.metrics[name] for record in group) for name in group[0].metrics}
    if group[0].kl is not None:
        row["kl"], row["kl_stderr"] = mean_and_error([fmean(record.kl or 0.0 for record in draws) for draws in grid])
        row["kl_k3"] = fmean(record.kl_k3 or 0.0 for record in group)
    columns = [[record.response for record in column] for column in zip(*grid, strict=True)]
    return row | {
        "length": fmean(map(_words, group)),
        "length_tokens": fmean(record.tokens for record in group),
        "repetition": fmean(repetition_rate(record.response) for record in group),
        "distinct_1": fmean(distinct_n(texts, 1) for texts in columns),
        "distinct_2": fmean(distinct_n(texts, 2) for texts in columns),
        "truncated_share": fmean(not record.ended for record in group),
    }


def _words(record: ScoredResponse) -> int:
    return word_count(record.response)


def _shares(grid: Grid, samples: int, seed: int) -> dict[str, float]:
    """Accuracy over the prompts with a known answer, and success of conversations, with intervals; {} without any."""
    known = [[record.correct for record in draws if record.correct is not None] for draws in grid]
    known = [correct for correct in known if correct]
    shares: dict[str, Numbers | list[float]] = {}
    for reading in known[0][0] if known else ():
        right = np.array([[float(correct[reading]) for correct in draws] for draws in known])
        shares[f"accuracy_{reading}"] = right.mean(axis=1)
        if reading == "flexible":
            shares |= {
                f"pass_at_{2**power}": pass_at_k(right, 2**power) for power in range(1, right.shape[1].bit_length())
            }
    if "success" in grid[0][0].metrics:
        shares["success"] = _matrix(grid, lambda record: record.metrics["success"]).mean(axis=1)
    row: dict[str, float] = {}
    for name, values in shares.items():
        row |= _share(name, values, samples, seed)
    return row


def _share(name: str, values: Numbers | Sequence[float], samples: int, seed: int) -> dict[str, float]:
    return _interval(name, bootstrap_mean([float(value) for value in values], samples=samples, seed=seed))


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _win_rate_metrics(judge: str, grid: Grid, reference: Grid, samples: int, seed: int) -> dict[str, float]:
    """Win rate and gain over the reference by one judge; every judge and policy resamples the same prompts."""
    scores, base = (_matrix(own, lambda record: record.scores[judge]) for own in (grid, reference))
    wins = pair_wins(scores, base)
    rate = bootstrap_mean(wins.mean(axis=(1, 2)).tolist(), samples=samples, seed=seed)
    gains = (scores.mean(axis=1) - base.mean(axis=1)) / _score_std(base)
    gain, error = mean_and_error(gains.tolist())
    prefix = WIN_RATE_KEYS[judge]
    return _interval(prefix, rate) | {
        f"{prefix}_ties": float((wins == 0.5).mean()),
        f"gain_{judge}": gain,
        f"gain_{judge}_stderr": error,
    }


def _control_metrics(grid: Grid, reference: Grid, samples: int, seed: int) -> dict[str, float]:
    """The gold judge's win rate at equal length, of finished pairs, and of pairs of the same length."""
    wins = pair_wins(*(_matrix(own, lambda record: record.gold) for own in (grid, reference)))
    words, base_words = (_matrix(own, _words) for own in (grid, reference))
    ended, base_ended = (_matrix(own, lambda record: record.ended) > 0 for own in (grid, reference))
    differences = words[:, :, None] - base_words[:, None, :]
    controlled = length_controlled(wins, differences, samples=samples, seed=seed)
    row = _interval("win_rate_length_controlled", controlled) | {"win_rate_length_controlled_pairs": wins.size}
    subsets = {"finished": ended[:, :, None] & base_ended[:, None, :], "same_length": np.abs(differences) <= 1}
    for name, chosen in subsets.items():
        if found := subset_win_rate(wins, chosen, samples=samples, seed=seed):
            row |= _interval(f"win_rate_{name}", found[0]) | {f"win_rate_{name}_pairs": found[1]}
    return row


def _score_std(values: Numbers) -> float:
    """Standard deviation (n − 1); 1 where all values are equal, so that a gain is then in the judge's own points."""
    return (float(values.std(ddof=1)) if values.size > 1 and np.ptp(values) > 0 else 0.0) or 1.0


@dataclass(frozen=True)
class Example:
    """Responses of a policy and the reference to one prompt; `score_difference` is what they are ranked by."""

    score_difference: float
    reference: ScoredResponse
    own: ScoredResponse


def select_examples(records: Sequence[ScoredResponse], count: int = 3) -> dict[str, dict[str, list[Example]]]:
    """Select up to `count` examples of each kind for each policy except the reference, the largest first.

    Only the first draw of each prompt is looked at.

    Kinds: `gains` above the reference by the gold judge, in its own points; `losses` below it, with negative
    differences; `disagreements`, gain by the proxy less gain by the gold judge, each in standard deviations of the
    reference's scores: the proxy scores them high and the gold judge low, so they are candidates for reward hacking.
    """
    groups = by_policy(first_draws(records))
    reference = {record.prompt_id: record for record in groups.pop(REFERENCE)}
    scale = {
        judge: _score_std(np.array([record.scores[judge] for record in reference.values()]))
        for judge in ("gold", "proxy")
    }

    def gain(judge: str, own: ScoredResponse) -> float:
        return own.scores[judge] - reference[own.prompt_id].scores[judge]

    differences: dict[str, tuple[Callable[[ScoredResponse], float], int]] = {
        "gains": (lambda own: gain("gold", own), 1),
        "losses": (lambda own: gain("gold", own), -1),
        "disagreements": (lambda own: gain("proxy", own) / scale["proxy"] - gain("gold", own) / scale["gold"], 1),
    }

    def top(group: Sequence[ScoredResponse], difference: Callable[[ScoredResponse], float], sign: int) -> list[Example]:
        examples = [Example(difference(own), reference[own.prompt_id], own) for own in group]
        found = [example for example in examples if sign * example.score_difference > TIE_TOLERANCE]
        return sorted(found, key=lambda example: (-sign * example.score_difference, example.own.prompt_id))[:count]

    return {
        policy: {kind: top(group, difference, sign) for kind, (difference, sign) in differences.items()}
        for policy, group in groups.items()
    }


def examples_to_dict(examples: Mapping[str, Sequence[Example]]) -> dict[str, list[dict[str, Any]]]:
    """Convert the examples of one policy to JSON types."""
    return {
        kind: [
            {
                "prompt_id": example.own.prompt_id,
                "prompt": example.own.prompt,
                "score_difference": round(example.score_difference, DIGITS),
            }
            | {
                record.policy: {"response": record.display_text, "ended": record.ended, "kl": record.kl} | record.scores
                for record in (example.reference, example.own)
            }
            for example in group
        ]
        for kind, group in examples.items()
    }
