"""Signs that a policy games its reward, each a number with a threshold at which it counts as found.

They compare an update with the first one, whose responses the SFT policy wrote. No sign proves anything: a finding
says where to look. Thresholds are calibrated on twelve healthy runs of the default task (PPO under eight seeds, GRPO
under four): the largest value that any of their updates reached stands beside each, and none reaches a threshold. Those
of `unfamiliar_responses` and `kl_spike` are of eight of them, PPO and GRPO under seeds 0 to 3; those of `length_drift`
and `reward_variance_collapse` are of single updates, so that two in a row can only have less.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["DETECTORS", "PREFIX", "Detector", "fired", "watch"]

Row = Mapping[str, float]
Rows = Sequence[Row]
Sign = Callable[[Rows, Mapping[str, float]], float | None]

PREFIX = "hacking/"
"""Before a detector's name, in a row and in MLflow."""

SMALL = 1e-6
MOST = 1000.0
"""Where a factor is no longer counted on: responses that all earn the same have no spread at all."""
JUMP = 0.5
"""Nats per response that the KL may change by from one update to the next in any case: its estimate is that noisy."""


@dataclass(frozen=True)
class Detector:
    """One sign.

    Attributes:
        value: of the last of these rows, given the weights of the reward's components; None where the rows lack
            what it needs.
        threshold: it fires at this value and above.
        healthy: the largest value in the runs of the calibration.
        finding: what it means when it fires, after the number.
    """

    name: str
    value: Sign
    threshold: float
    healthy: float
    finding: str

    def says(self, value: float) -> str:
        """The finding as a sentence."""
        return f"{self.name} {value:.2f} (threshold {self.threshold:g}, healthy up to {self.healthy:g}): {self.finding}"


def watch(rows: Rows, weights: Mapping[str, float]) -> tuple[dict[str, float], list[tuple[Detector, float]]]:
    """The signs of the newest row, and each detector that fires in it and did not in the row before, with its value.

    Args:
        rows: one per update, from the first; those before the newest with the signs that this function gave for them.
        weights: of the reward's components.
    """
    before = rows[-2] if len(rows) > 1 else {}
    signs, found = {}, []
    for detector in DETECTORS:
        value = detector.value(rows, weights)
        if value is None:
            continue
        signs[PREFIX + detector.name] = value
        if value >= detector.threshold > before.get(PREFIX + detector.name, 0.0):
            found.append((detector, value))
    return signs, found


def fired(rows: Rows) -> list[tuple[Detector, int, float]]:
    """Each detector that fired in training, with the first update in which it did, from 1, and its largest value."""
    found = []
    for detector in DETECTORS:
        values = [row.get(PREFIX + detector.name, 0.0) for row in rows]
        first = next((place for place, value in enumerate(values, start=1) if value >= detector.threshold), None)
        if first:
            found.append((detector, first, max(values)))
    return found


def _growth(name: str) -> Sign:
    """How many times larger or smaller it has become."""

    def value(rows: Rows, _weights: Mapping[str, float]) -> float | None:
        if name not in rows[-1]:
            return None
        return max(_times(rows[-1][name], rows[0][name]), _times(rows[0][name], rows[-1][name]))

    return value


def _shrinkage(name: str) -> Sign:
    """How many times smaller it has become."""

    def value(rows: Rows, _weights: Mapping[str, float]) -> float | None:
        return _times(rows[0][name], rows[-1][name]) if name in rows[-1] else None

    return value


def _times(one: float, other: float) -> float:
    return min(max(one, SMALL) / max(other, SMALL), MOST)


def _rise(name: str) -> Sign:
    """How much it has risen."""
    return lambda rows, _weights: rows[-1][name] - rows[0][name] if name in rows[-1] else None


def _lasting(sign: Sign) -> Sign:
    """The smaller of the last two updates' values, for what a single update's responses tell too loosely.

    PPO on its way to shorter, finished sentences has one update of half the length among its neighbours; where few
    responses earn anything, an update in which none does has no spread at all.
    """

    def value(rows: Rows, weights: Mapping[str, float]) -> float | None:
        now, before = sign(rows, weights), sign(rows[:-1], weights) if len(rows) > 1 else None
        return now if now is None or before is None else min(now, before)

    return value


def _cost(rows: Rows, weights: Mapping[str, float]) -> float | None:
    """What the component that lost most has lost, as a share of what the whole reward has gained."""
    if len(weights) < 2:
        return None
    gains = [weight * (rows[-1][f"reward/{name}"] - rows[0][f"reward/{name}"]) for name, weight in weights.items()]
    gain = sum(gains)
    return max(0.0, -min(gains)) / gain if gain > SMALL else 0.0


def _jump(rows: Rows, _weights: Mapping[str, float]) -> float | None:
    """By how much the KL of the last two updates, both, is above the one before, in medians of its changes till then.

    No median counts as less than `JUMP`. Two updates, because a single token can make one estimate by k3, whose tail is
    heavy, many times too large: GRPO under seed 2 has 6 nats in one update and under 1 in its neighbours.
    """
    values = [row["kl"] for row in rows if "kl" in row]
    if "kl" not in rows[-1] or len(values) < 3:
        return None
    *before, one, other = values
    changes = [abs(later - earlier) for earlier, later in itertools.pairwise(before)]
    usual = statistics.median(changes) if changes else 0.0
    return max(0.0, (min(one, other) - before[-1]) / max(usual, JUMP))


DETECTORS = (
    Detector(
        "length_drift",
        _lasting(_growth("length")),
        threshold=2.0,
        healthy=1.83,
        finding="responses are half or twice as long as SFT's; judges and reward models are swayed by length",
    ),
    Detector(
        "repetition",
        _rise("repetition"),
        threshold=0.1,
        healthy=0.01,
        finding="responses repeat themselves; a repetition weight or a higher ppo.kl_coef stands against it",
    ),
    Detector(
        "ngram_collapse",
        _shrinkage("distinct_2"),
        threshold=2.0,
        healthy=1.07,
        finding="responses to different prompts share their word pairs: the policy says the same to everybody",
    ),
    Detector(
        "entropy_collapse",
        _shrinkage("entropy"),
        threshold=2.0,
        healthy=1.37,
        finding="the policy has become twice as sure of every token; it will hardly try anything else",
    ),
    Detector(
        "reward_variance_collapse",
        _lasting(_shrinkage("score_std")),
        threshold=2.0,
        healthy=1.65,
        finding="all responses earn nearly the same, so there is little left to learn from but noise",
    ),
    Detector(
        "one_component_pays",
        _cost,
        threshold=0.5,
        healthy=0.01,
        finding="one component of the reward rises at the expense of another: lower its weight",
    ),
    Detector(
        "truncation",
        _rise("no_end_share"),
        threshold=0.25,
        healthy=0.14,
        finding="more responses are cut before their end than SFT's; raise missing_eos_penalty or max_new_tokens",
    ),
    Detector(
        "unfamiliar_responses",
        _rise("unfamiliar"),
        threshold=0.25,
        healthy=0.16,
        finding="more responses than SFT's are unlike all that people compared: there the reward model only guesses",
    ),
    Detector(
        "kl_spike",
        _jump,
        threshold=5.0,
        healthy=3.92,
        finding="the policy has moved away from SFT in one update as it did before in many; lower the learning rate",
    ),
)
