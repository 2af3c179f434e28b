"""Aggregate scored responses into one row of metrics per policy, and select examples of where policies differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pydantic import Field

from tasks.core.errors import DataError
from tasks.core.rows import Row
from tasks.core.text_stats import distinct_n, repetition_rate, word_count
from tasks.evals.statistics import TIE_TOLERANCE, bootstrap_mean, mean_and_error, pairwise_wins

__all__ = [
    "DIGITS", "HEADLINE", "JUDGE_NAMES", "REFERENCE", "Example", "HackingFinding", "ScoredResponse", "Table",
    "by_policy", "compare_policies", "examples_to_dict", "headline", "judges_of", "select_examples", "win_rates_of",
]  # fmt: skip

REFERENCE = "sft"

WIN_RATE_KEYS: Mapping[str, str] = {"gold": "win_rate", "vader": "win_rate_vader", "proxy": "win_rate_proxy"}
"""Judge → prefix of its keys in the table; `judges_of` gives the judges of one table."""

JUDGE_NAMES = {"gold": "gold judge", "judge": "LLM judge", "vader": "VADER", "proxy": "proxy reward"}
"""Display names; the LLM judge compares pairs without a score, so it has a win rate and no gain."""

HEADLINE = (
    "win_rate", "win_rate_low", "win_rate_high", "win_rate_vader", "win_rate_proxy", "reward_gold", "reward_proxy",
    "accuracy_strict", "accuracy_flexible", "vader", "kl", "kl_stderr", "length", "repetition", "distinct_2",
    "truncated_share", "win_rate_judge", "judge_first", "judge_inconsistent", "success", "success_low", "success_high",
    "turns",
)  # fmt: skip
"""Keys of the table that metrics.json repeats for DVC and MLflow; policies.json has all keys."""

DIGITS = 6
"""Decimals kept in tables: finer than any interval here can resolve."""

Table = dict[str, dict[str, float]]
"""Policy → key → number; what the keys mean: `compare_policies`."""


class ScoredResponse(Row):
    """Response of a policy with all its scores and metrics; `id` is `<policy>/<prompt id>`."""

    policy: str
    prompt_id: str
    prompt: str
    response: str = Field(description="Without its end token; carries its own leading space.")
    tokens: int = Field(ge=0, description="Response tokens, the end token included.")
    ended: bool = Field(description="Whether the policy wrote its end token in time.")
    kl: float = Field(description="Σ over response tokens of log π − log π_ref (k1), nats.")
    kl_k3: float = Field(description="Σ over response tokens of e^(−Δ) − 1 + Δ, Δ = log π − log π_ref (k3), nats.")
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


def compare_policies(records: Sequence[ScoredResponse], *, samples: int, seed: int) -> Table:
    """Compute one row of metrics per policy, in the order of the records.

    Keys: `n` prompts; `reward_proxy`, `reward_gold`, `reward_<component>` means; `win_rate`, `win_rate_vader`,
    `win_rate_proxy` against the reference by the gold judge, VADER and the proxy, each with `_low` and `_high` (95 %
    bootstrap interval over prompts; the reference itself has ½) and `_ties`, the share of equal scores; `gain_gold`,
    `gain_vader`, `gain_proxy` mean difference to the reference in standard deviations of the reference's scores, each
    with `_stderr`; `kl` nats per response with `kl_stderr`, and `kl_k3`; `length` in words, `length_tokens`;
    `repetition`; `distinct_1`, `distinct_2`; `truncated_share`; the mean of each measure under its name, such as
    `ood_share`. Where VADER judges, its mean `vader`.
    Where right answers are known: `accuracy_strict`, `accuracy_flexible` over those prompts, with `_low` and `_high`.
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
    reference = groups[REFERENCE]
    table: Table = {}
    for policy, group in groups.items():
        aligned = _align_by_prompt(group, reference)
        row = _policy_metrics(aligned) | _shares(aligned, samples, seed)
        for judge in reference[0].scores:
            row |= _win_rate_metrics(judge, aligned, reference, samples, seed)
        table[policy] = {key: round(value, DIGITS) for key, value in row.items()}
    return table


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


def _align_by_prompt(group: Sequence[ScoredResponse], reference: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """The group's records in the order of the reference's prompts."""
    by_prompt = {record.prompt_id: record for record in group}
    prompt_ids = [record.prompt_id for record in reference]
    if len(by_prompt) != len(group) or len(group) != len(reference) or set(by_prompt) != set(prompt_ids):
        raise DataError(
            f"{group[0].policy} has {len(group)} responses to {len(by_prompt)} prompts, {REFERENCE} has "
            f"{len(reference)}; each policy must answer each prompt of {REFERENCE} once"
        )
    return [by_prompt[prompt] for prompt in prompt_ids]


def _policy_metrics(group: Sequence[ScoredResponse]) -> dict[str, float]:
    """Metrics of one policy's responses alone."""
    texts = [record.response for record in group]
    kl, kl_stderr = mean_and_error([record.kl for record in group])
    row = {"n": len(group)} | {
        f"reward_{judge}": fmean(record.scores[judge] for record in group) for judge in ("proxy", "gold")
    }
    if "vader" in group[0].scores:
        row["vader"] = fmean(record.scores["vader"] for record in group)
    row |= {f"reward_{name}": fmean(record.rewards[name] for record in group) for name in group[0].rewards}
    row |= {name: fmean(record.metrics[name] for record in group) for name in group[0].metrics}
    return row | {
        "kl": kl,
        "kl_stderr": kl_stderr,
        "kl_k3": fmean(record.kl_k3 for record in group),
        "length": fmean(word_count(text) for text in texts),
        "length_tokens": fmean(record.tokens for record in group),
        "repetition": fmean(repetition_rate(text) for text in texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "truncated_share": fmean(not record.ended for record in group),
    }


def _shares(group: Sequence[ScoredResponse], samples: int, seed: int) -> dict[str, float]:
    """Accuracy over the prompts with a known answer, and success of conversations, with intervals; {} without any."""
    known = [record.correct for record in group if record.correct is not None]
    flags = {f"accuracy_{reading}": [float(correct[reading]) for correct in known] for reading in (known or [{}])[0]}
    if "success" in group[0].metrics:
        flags["success"] = [record.metrics["success"] for record in group]
    row: dict[str, float] = {}
    for name, values in flags.items():
        share = bootstrap_mean(values, samples=samples, seed=seed)
        row |= {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}
    return row


def _win_rate_metrics(
    judge: str, group: Sequence[ScoredResponse], reference: Sequence[ScoredResponse], samples: int, seed: int
) -> dict[str, float]:
    """Win rate and gain over the reference by one judge; every judge and policy resamples the same prompts."""
    scores, base = ([record.scores[judge] for record in records] for records in (group, reference))
    outcomes = pairwise_wins(scores, base)
    rate = bootstrap_mean(outcomes, samples=samples, seed=seed)
    scale = _score_std(base)
    gain, error = mean_and_error([(own - other) / scale for own, other in zip(scores, base, strict=True)])
    prefix = WIN_RATE_KEYS[judge]
    return {
        prefix: rate.mean,
        f"{prefix}_low": rate.low,
        f"{prefix}_high": rate.high,
        f"{prefix}_ties": fmean(outcome == 0.5 for outcome in outcomes),
        f"gain_{judge}": gain,
        f"gain_{judge}_stderr": error,
    }


def _score_std(values: Sequence[float]) -> float:
    """Standard deviation (n − 1); 1 where all values are equal, so that a gain is then in the judge's own points."""
    return (stdev(values) if len(values) > 1 else 0.0) or 1.0


@dataclass(frozen=True)
class Example:
    """Responses of a policy and the reference to one prompt; `score_difference` is what they are ranked by."""

    score_difference: float
    reference: ScoredResponse
    own: ScoredResponse


def select_examples(records: Sequence[ScoredResponse], count: int = 3) -> dict[str, dict[str, list[Example]]]:
    """Select up to `count` examples of each kind for each policy except the reference, the largest first.

    Kinds: `gains` above the reference by the gold judge, in its own points; `losses` below it, with negative
    differences; `disagreements`, gain by the proxy less gain by the gold judge, each in standard deviations of the
    reference's scores: the proxy scores them high and the gold judge low, so they are candidates for reward hacking.
    """
    groups = by_policy(records)
    reference = {record.prompt_id: record for record in groups.pop(REFERENCE)}
    scale = {judge: _score_std([record.scores[judge] for record in reference.values()]) for judge in ("gold", "proxy")}

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
