"""Records of whole groups of responses, token by token, for people to look into: see `tasks.evals.rollouts_page`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.models.encoding import decode_response
from tasks.rl.advantages import token_rewards
from tasks.rl.masking import through_last_true, zero_masked

if TYPE_CHECKING:
    from tasks.config.rl import RLParams
    from tasks.rl.advantages import Action
    from tasks.rl.algorithm import Experience, ScoredRollout

__all__ = ["record_groups", "token_texts", "with_texts"]

Record = dict[str, Any]

RECORDED_RESPONSES = 16  # of an update; or one group, where that is larger
RECORDED_TOKENS = 500_000  # of a run: about 25 MB
MAX_BYTES = 4  # of a character in UTF-8


def record_groups(
    scored: ScoredRollout,
    experience: Experience,
    params: RLParams,
    *,
    update: int,
    kl_coef: float,
    recorded: Sequence[Record],
) -> list[Record]:
    """Record groups of an update, evenly spaced, with token ids for texts; `recorded` are those of updates before.

    A group that is longer than what remains of `RECORDED_TOKENS` for the updates so far is left out, so that a long run
    records some updates alone. In `tokens` the prompt's last token stands before those of the response; a list of
    `values` has a number for each token of the response, 0 for the environment's.
    """
    group, rollout = params.samples_per_prompt, scored.rollout
    wanted, prompts = max(1, RECORDED_RESPONSES // group), len(rollout) // group
    values = _token_values(scored, experience, params, kl_coef)
    room = RECORDED_TOKENS * update // params.updates - sum(len(record["tokens"]) for record in recorded)
    found: list[Record] = []
    for prompt in list(range(0, prompts, max(1, prompts // wanted)))[:wanted]:
        records = [_record(scored, values, row, update, group) for row in range(prompt * group, (prompt + 1) * group)]
        size = sum(len(record["tokens"]) for record in records)
        if size <= room:
            found, room = found + records, room - size
    return found


def with_texts(records: Sequence[Record], tokenizer: Any) -> Iterator[Record]:
    """Give each record its tokens as texts."""
    for record in records:
        yield {**record, "tokens": token_texts(tokenizer, record["tokens"])}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text that each token after the first adds; "" for a special one.

    Of a character that several tokens spell, the last of them has all.
    """
    texts: list[str] = []
    start = 1
    for end in range(2, len(ids) + 1):
        text = decode_response(tokenizer, ids[start - 1 : start], ids[start:end])
        if text.endswith("\ufffd") and end < len(ids) and end - start < MAX_BYTES:
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def _record(scored: ScoredRollout, values: Mapping[str, Tensor], row: int, update: int, group: int) -> Record:
    rollout, reward, mask = scored.rollout, scored.reward, scored.rollout.response_mask[row]
    length = int(through_last_true(mask.unsqueeze(0)).sum())
    is_policy = mask[:length].int().tolist()
    return {
        "update": update,
        "group": row // group,
        "sample": row % group,
        "prompt": rollout.prompt_texts[row],
        "response": rollout.transcripts[row],
        "ended": bool(rollout.has_eos[row]),
        "score": _rounded(scored.scores[row].item()),
        "reward": _rounded(reward.total[row].item()),
        "components": {name: _rounded(value[row].item()) for name, value in reward.components.items()},
        "metrics": {name: _rounded(value[row].item()) for name, value in reward.metrics.items()},
        "kl": _rounded(scored.sequence_kl[row].item()),
        "tokens": [int(rollout.prompts[row, -1]), *rollout.responses[row, :length].tolist()],
        **({} if all(is_policy) else {"is_policy": is_policy}),
        "values": {name: list(map(_rounded, value[row, :length].tolist())) for name, value in values.items()},
    }


def _token_values(scored: ScoredRollout, experience: Experience, params: RLParams, kl_coef: float) -> dict[str, Tensor]:
    """Quantity → its value at each token, [B, T], 0 where masked; rewards with the KL penalty where it is in them."""
    rollout, mask = scored.rollout, scored.rollout.response_mask
    in_reward = kl_coef if params.kl_penalty == "reward" else 0.0
    action: Action = getattr(params, "action", "token")  # GRPO's actions are tokens
    values = {
        "advantage": _to_tokens(zero_masked(experience.advantages, experience.action_mask), mask, action),
        "kl": scored.kl.k1,
        "reward": token_rewards(scored.scores, scored.kl.k1, mask, kl_coef=in_reward),
        "logprob": rollout.logprobs,
    }
    if scored.entropies is not None:
        values["entropy"] = zero_masked(scored.entropies, mask)
    if rollout.engine_logprobs is not None:
        values["mismatch"] = zero_masked(rollout.logprobs - rollout.engine_logprobs, mask)
    return values


def _to_tokens(per_action: Tensor, mask: Tensor, action: Action) -> Tensor:
    """Value of the action that each token belongs to, [B, A] → [B, T]."""
    if action == "response":
        per_action = per_action.expand(mask.shape)
    elif action == "turn":
        starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        per_action = per_action.gather(1, starts.cumsum(1) - 1)
    return zero_masked(per_action, mask)


def _rounded(value: float) -> float | None:
    """Round to three significant digits; None, which JSON has, for what is not finite."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
