"""Checks of each update: non-finite values, degenerate responses, and detectors of reward hacking."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.core.errors import TrainingError
from tasks.core.text_stats import distinct_n, repetition_rate

__all__ = [
    "DETECTORS", "DegenerateResponseMonitor", "check_finite", "detectors_fired", "format_samples", "response_metrics",
    "run_detectors",
]  # fmt: skip

SHOWN_ROWS, SHOWN_CHARACTERS = 3, 200


def check_finite(quantity: str, values: Tensor, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Raise TrainingError, with the quantity and the samples, for values [B, ...] that are NaN or infinite."""
    rows = (~torch.isfinite(values.reshape(len(prompts), -1)).all(1)).nonzero().flatten().tolist()
    if rows:
        raise TrainingError(
            f"{quantity} not finite for {len(rows)} of {len(prompts)} responses: "
            f"{format_samples(rows, prompts, responses)}"
        )


def format_samples(rows: Sequence[int], prompts: Sequence[str], responses: Sequence[str]) -> str:
    """Format the first of these samples for an error message."""
    texts = [
        f"prompt {prompts[row][:SHOWN_CHARACTERS]!r}, response {responses[row][:SHOWN_CHARACTERS]!r}"
        for row in rows[:SHOWN_ROWS]
    ]
    return "; ".join(texts) + (f"; and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")


def response_metrics(responses: Sequence[str], has_eos: Tensor) -> tuple[dict[str, float], list[str]]:
    """Metrics of a batch of responses, and a finding for each way in which it has degenerated.

    `repetition` is the mean share of word pairs that a response repeats; `distinct_2`, different word pairs over all
    pairs; `degenerate_count` counts the findings.
    """
    empty = sum(not response.strip() for response in responses) / len(responses)
    distinct = len(set(responses)) / len(responses)
    truncated = (~has_eos).float().mean().item()
    findings = []
    if empty == 1:
        findings.append("all responses are empty")
    elif len(responses) > 1 and len(set(responses)) == 1:
        findings.append(f"all {len(responses)} responses are the same: {responses[0][:SHOWN_CHARACTERS]!r}")
    if truncated == 1:
        findings.append("no response has an end token: all are cut at generation.max_new_tokens")
    metrics = {
        "empty_share": empty,
        "distinct_share": distinct,
        "truncated_share": truncated,
        "repetition": sum(map(repetition_rate, responses)) / len(responses),
        "distinct_2": distinct_n(responses, 2),
        "degenerate_count": float(len(findings)),
    }
    return metrics, findings


class DegenerateResponseMonitor:
    """Measures the responses of each update, and warns of a finding when it first appears."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._previous_findings: list[str] = []

    def __call__(self, responses: Sequence[str], has_eos: Tensor, update: int) -> dict[str, float]:
        metrics, findings = response_metrics(responses, has_eos)
        for finding in findings:
            if finding not in self._previous_findings:
                self._warn(f"warning: update {update}: {finding}")
        self._previous_findings = findings
        return metrics


Rows = Sequence[Mapping[str, float]]
Signal = Callable[[Rows, Mapping[str, float]], float | None]

PREFIX = "hacking/"  # of a detector's name, in a row and in MLflow
EPSILON = 1e-6
MAX_RATIO = 1000.0  # the standard deviation of equal rewards is 0
MIN_KL_CHANGE = 0.5  # in nats per response: the estimate of the KL is that noisy


@dataclass(frozen=True)
class Detector:
    """A signal of the last of some rows, given the weights of the reward's components, and its threshold."""

    name: str
    value: Signal  # None where the rows lack what it needs
    threshold: float  # it fires at this value and above
    calibration_max: float  # the largest value in the calibration runs
    finding: str  # what it means when it fires

    def message(self, value: float) -> str:
        """Format the value, its threshold and the finding."""
        limits = f"threshold {self.threshold:g}, healthy up to {self.calibration_max:g}"
        return f"{self.name} {value:.2f} ({limits}): {self.finding}"


def run_detectors(rows: Rows, weights: Mapping[str, float]) -> tuple[dict[str, float], list[tuple[Detector, float]]]:
    """Signals of the newest row, and each detector that fires in it and did not in the row before, with its value.

    `rows` has one per update, from the first; those before the newest with the signals that this function gave.
    """
    previous = rows[-2] if len(rows) > 1 else {}
    signals, found = {}, []
    for detector in DETECTORS:
        value = detector.value(rows, weights)
        if value is None:
            continue
        signals[PREFIX + detector.name] = value
        if value >= detector.threshold > previous.get(PREFIX + detector.name, 0.0):
            found.append((detector, value))
    return signals, found


def detectors_fired(rows: Rows) -> list[tuple[Detector, int, float]]:
    """List each detector that fired in training, with its first update, from 1, and its largest value."""
    found = []
    for detector in DETECTORS:
        values = [row.get(PREFIX + detector.name, 0.0) for row in rows]
        first = next((update for update, value in enumerate(values, start=1) if value >= detector.threshold), None)
        if first:
            found.append((detector, first, max(values)))
    return found


def _against_first(name: str, compare: Callable[[float, float], float]) -> Signal:
    """Comparison of the first value with the newest."""
    return lambda rows, _weights: compare(rows[0][name], rows[-1][name]) if name in rows[-1] else None


def _increase(first: float, newest: float) -> float:
    return newest - first


def _shrink_ratio(first: float, newest: float) -> float:
    return min(max(first, EPSILON) / max(newest, EPSILON), MAX_RATIO)


def _ratio_change(first: float, newest: float) -> float:
    """Ratio of the two, or its inverse where that is larger."""
    return max(_shrink_ratio(newest, first), _shrink_ratio(first, newest))


def _sustained(signal: Signal) -> Signal:
    """The smaller of the last two updates' values, for signals that are noisy in a single update.

    PPO on its way to shorter sentences has one update of half the length among its neighbours; where few responses earn
    a reward, an update in which none does has a standard deviation of 0; where the whole reward has gained next to
    nothing yet, any loss of a component is many times the gain.
    """

    def value(rows: Rows, weights: Mapping[str, float]) -> float | None:
        latest, previous = signal(rows, weights), signal(rows[:-1], weights) if len(rows) > 1 else None
        return latest if latest is None or previous is None else min(latest, previous)

    return value


def _component_loss(rows: Rows, weights: Mapping[str, float]) -> float | None:
    """Largest loss of a component, as a fraction of the gain of the whole reward."""
    if len(weights) < 2:
        return None
    gains = [weight * (rows[-1][f"reward/{name}"] - rows[0][f"reward/{name}"]) for name, weight in weights.items()]
    gain = sum(gains)
    return max(0.0, -min(gains)) / gain if gain > EPSILON else 0.0


def _kl_jump(rows: Rows, _weights: Mapping[str, float]) -> float | None:
    """Rise of the KL that lasts for two updates, in medians of its earlier changes.

    No median counts as less than `MIN_KL_CHANGE`. Two updates, because a single token can make one estimate many times
    too large: GRPO under seed 2 has 6 nats in one update and under 1 in its neighbours.
    """
    values = [row["kl"] for row in rows if "kl" in row]
    if "kl" not in rows[-1] or len(values) < 3:
        return None
    *before, second_last, last = values
    changes = [abs(later - earlier) for earlier, later in itertools.pairwise(before)]
    median_change = statistics.median(changes) if changes else 0.0
    return max(0.0, (min(second_last, last) - before[-1]) / max(median_change, MIN_KL_CHANGE))


DETECTORS = (
    # name, value, threshold, calibration_max; below them the finding
    Detector("length_drift", _sustained(_against_first("length", _ratio_change)), 2.0, 1.83,
             "responses are half or twice as long as SFT's; judges and reward models are swayed by length"),
    Detector("repetition", _against_first("repetition", _increase), 0.1, 0.01,
             "responses repeat themselves; a repetition weight or a higher ppo.kl_coef stands against it"),
    Detector("ngram_collapse", _against_first("distinct_2", _shrink_ratio), 2.0, 1.07,
             "responses to different prompts share their word pairs: the policy says the same to everybody"),
    Detector("entropy_collapse", _against_first("entropy", _shrink_ratio), 2.0, 1.37,
             "the policy has become twice as sure of every token; it will hardly try anything else"),
    Detector("reward_variance_collapse", _sustained(_against_first("score_std", _shrink_ratio)), 2.0, 1.65,
             "all responses earn nearly the same, so there is little left to learn from but noise"),
    Detector("component_tradeoff", _sustained(_component_loss), 0.5, 0.01,
             "one component of the reward rises at the expense of another: lower its weight"),
    Detector("truncation", _against_first("truncated_share", _increase), 0.25, 0.14,
             "more responses are cut before their end than SFT's; raise missing_eos_penalty or max_new_tokens"),
    Detector("ood_responses", _against_first("ood_share", _increase), 0.25, 0.16,
             "more responses than SFT's are unlike all that people compared: there the reward model only guesses"),
    Detector("kl_spike", _kl_jump, 5.0, 3.92,
             "the policy has moved away from SFT in one update as it did before in many; lower the learning rate"),
)  # fmt: skip
