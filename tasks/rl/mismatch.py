"""Mismatch between the engine that sampled and the trainer's model: importance weights, metrics, and the limit.

An engine computes the same model with other kernels, or in another number format, so what it samples from is not quite
what is trained. With d = log π_trainer − log π_engine at each sampled token, the weights e^d correct the policy
gradient. Truncated as in Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
(fengyao.notion.site/off-policy-rl); masked as in IcePop (Ling Team 2025, arXiv 2510.18855, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.core.errors import TrainingError
from tasks.rl.kl import kl_estimates
from tasks.rl.masking import masked_mean, masked_sum, zero_masked

if TYPE_CHECKING:
    from tasks.config.rl import RolloutParams

__all__ = ["check_mismatch", "importance_weights", "mismatch_metrics"]

SHOWN = 3  # tokens named in the error


def importance_weights(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, params: RolloutParams) -> Tensor:
    """Weights [B, A] of actions from their log-probabilities [B, A]: e^d up to `is_clip`, and beyond it that or 0.

    With level `sequence` all actions of a response have the product of their weights, cut after it is taken. 0 where
    masked; no gradient flows through them.
    """
    log_weights = zero_masked(logprobs - engine_logprobs, mask).detach()
    if params.is_level == "sequence":
        log_weights = masked_sum(log_weights, mask, dim=1).unsqueeze(1).expand(mask.shape)
    weights = log_weights.exp()
    most = torch.full_like(weights, params.is_clip if params.is_mode == "truncate" else 0.0)
    return zero_masked(torch.where(weights > params.is_clip, most, weights), mask)


def mismatch_metrics(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, params: RolloutParams
) -> dict[str, float]:
    """Numbers to log, of the tokens [B, T] that count.

    `mismatch/kl`: KL(engine ‖ trainer), nats per token (k3, never negative); `mismatch/mean` and `mismatch/max` of |d|;
    `mismatch/clipped_share`: tokens whose own weight is above `is_clip`.
    """
    gap = zero_masked(logprobs - engine_logprobs, mask)
    clipped = (gap.exp() > params.is_clip).to(gap.dtype)
    return {
        "mismatch/kl": masked_mean(kl_estimates(engine_logprobs, logprobs, mask).k3, mask).item(),
        "mismatch/mean": masked_mean(gap.abs(), mask).item(),
        "mismatch/max": gap.abs().max().item(),
        "mismatch/clipped_share": masked_mean(clipped, mask).item(),
    }


def check_mismatch(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, texts: Sequence[str], params: RolloutParams
) -> None:
    """Check that the engine samples from what is trained.

    Raises:
        TrainingError: the KL per token is above `max_mismatch_kl`; the message names the worst tokens.
    """
    kl = mismatch_metrics(logprobs, engine_logprobs, mask, params)["mismatch/kl"]
    if kl <= params.max_mismatch_kl:  # not `>`: a KL that is not a number must not pass
        return
    gap = zero_masked(logprobs - engine_logprobs, mask).abs()
    worst = gap.nan_to_num(torch.inf).flatten().topk(min(SHOWN, gap.numel())).indices.tolist()
    places = [divmod(place, gap.shape[1]) for place in worst]
    tokens = "; ".join(
        f"token {column + 1} of {texts[row][:60]!r}: {engine_logprobs[row, column]:.3f} there, "
        f"{logprobs[row, column]:.3f} here"
        for row, column in places
    )
    raise TrainingError(
        f"the engine does not sample from the policy that is trained: KL {kl:.3g} nats per token, limit "
        f"rollout.max_mismatch_kl {params.max_mismatch_kl:g}; log-probabilities: {tokens}. Does it serve this base "
        "model? With rollout.dtype float32 the two differ least"
    )
