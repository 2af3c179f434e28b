"""Replacement of prompts, with their responses, in a rollout that has been scored (DAPO, arXiv 2503.14476, 3.2)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tasks.rewards.composition import RewardBatch
from tasks.rl.algorithm import ScoredRollout
from tasks.rl.rollout import Rollout

__all__ = ["replace_groups"]


def replace_groups(scored: ScoredRollout, extra: ScoredRollout, group: int, places: Mapping[int, int]) -> ScoredRollout:
    """The scored rollout with the responses to some prompts replaced.

    Args:
        group: responses to each prompt.
        places: position of a prompt → position of the prompt of `extra` that takes its place.
    """
    count = len(scored.scores)
    rows = torch.arange(count)
    for place, position in places.items():
        rows[place * group : (place + 1) * group] = torch.arange(group) + count + position * group

    def merge(one: Tensor, other: Tensor, *, pad: int = 0, left: bool = False) -> Tensor:
        width = max(one.shape[-1], other.shape[-1])
        pair = [_widen(tensor, width, pad, left=left) for tensor in (one, other)] if one.dim() > 1 else [one, other]
        return torch.cat(pair)[rows.to(one.device)]

    own, others = scored.reward, extra.reward
    entropies = None
    if scored.entropies is not None and extra.entropies is not None:
        entropies = merge(scored.entropies, extra.entropies)
    return replace(
        scored,
        rollout=_merge_rollouts(scored.rollout, extra.rollout, rows, merge),
        reference_logprobs=merge(scored.reference_logprobs, extra.reference_logprobs),
        reward=RewardBatch(
            merge(own.total, others.total),
            {name: merge(values, others.components[name]) for name, values in own.components.items()},
            {name: merge(values, others.metrics[name]) for name, values in own.metrics.items()},
        ),
        scores=merge(scored.scores, extra.scores),
        entropies=entropies,
    )


def _merge_rollouts(one: Rollout, other: Rollout, rows: Tensor, merge: Any) -> Rollout:
    merged: dict[str, Any] = dict(vars(one))
    for name, value in merged.items():
        new = getattr(other, name)
        if isinstance(value, Tensor):
            pad = one.pad_token_id if name in ("prompts", "responses") else 0
            merged[name] = merge(value, new, pad=pad, left=name in ("prompts", "prompt_mask"))
        elif isinstance(value, list):
            merged[name] = [(value + new)[row] for row in rows.tolist()]
    return type(one)(**merged)


def _widen(tensor: Tensor, width: int, pad: int, *, left: bool) -> Tensor:
    """[B, n] → [B, width], filled with `pad` before or after what is there."""
    filling = tensor.new_full((len(tensor), width - tensor.shape[1]), pad)
    return torch.cat([filling, tensor] if left else [tensor, filling], dim=1)
