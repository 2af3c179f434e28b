"""Demonstrations beside the rollouts of PPO, against forgetting: PPO-ptx (Ouyang et al. 2022, arXiv 2203.02155)."""

from collections.abc import Sequence
from typing import Any

import torch

from tasks.core.errors import ModelError
from tasks.core.rows import Demonstration
from tasks.models.encoding import EncodedRow, context_length, encode_row
from tasks.models.loading import pad_ids
from tasks.rl.rollout import TokenBatch

__all__ = ["Demonstrations"]


class Demonstrations:
    """Demonstrations to draw from, and the weight of their loss.

    Those longer than the model's context are left out; a ModelError if that is all of them.
    """

    def __init__(self, rows: Sequence[Demonstration], tokenizer: Any, model: Any, coef: float) -> None:
        self.coef = coef
        self._pad_token_id, self._device = tokenizer.pad_token_id, next(model.parameters()).device
        encoded = [encode_row(tokenizer, row.prompt, row.response) for row in rows]
        context = context_length(model.config)
        self._rows: list[EncodedRow] = [row for row in encoded if context is None or row.length <= context]
        if not self._rows:
            raise ModelError(f"no demonstration fits the model's context of {context} tokens: set ppo.ptx_coef to 0")

    def draw(self, count: int, generator: torch.Generator) -> TokenBatch:
        """Draw so many, with replacement; the response mask covers the end token."""
        places = torch.randint(len(self._rows), (count,), generator=generator).tolist()
        rows = [self._rows[place] for place in places]
        prompts = pad_ids([row.prompt for row in rows], self._pad_token_id, side="left")
        responses = pad_ids([row.responses[0] for row in rows], self._pad_token_id, side="right")
        ids, mask, response_ids, response_mask = (tensor.to(self._device) for tensor in (*prompts, *responses))
        return TokenBatch(ids, mask, response_ids, response_mask, prompt_texts=[""] * count, texts=[""] * count)
