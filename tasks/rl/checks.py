"""Checks of each update: non-finite values and degenerate responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tasks.core.errors import TrainingError
from tasks.core.words import distinct_n, repetition_rate

__all__ = ["DegenerateResponseMonitor", "check_finite", "response_metrics", "format_samples"]

SHOWN_ROWS, SHOWN_CHARACTERS = 3, 200


def check_finite(quantity: str, values: Tensor, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Refuse values [B, ...] that are NaN or infinite.

    Raises:
        TrainingError: names the quantity and the samples.
    """
    rows = (~torch.isfinite(values.reshape(len(prompts), -1)).all(1)).nonzero().flatten().tolist()
    if rows:
        raise TrainingError(
            f"{quantity} not finite for {len(rows)} of {len(prompts)} responses: {format_samples(rows, prompts, responses)}"
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

    Shares of responses that are empty, distinct and without end token; `repetition`, the mean share of word pairs that
    a response repeats; `distinct_2`, different word pairs over all pairs; `degenerate` counts the findings: 0 in
    a healthy round.
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
        "no_end_share": truncated,
        "repetition": sum(map(repetition_rate, responses)) / len(responses),
        "distinct_2": distinct_n(responses, 2),
        "degenerate": float(len(findings)),
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
