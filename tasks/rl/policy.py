"""Policy (adapter on), reference (adapter off) and value function (a linear head) on one shared backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn

from tasks.models.batching import position_ids
from tasks.rl.losses import entropy_from_logits, logprobs_from_logits
from tasks.rl.masking import through_last_true
from tasks.rl.rollout import Rollout

__all__ = ["Experience", "Policy", "model_inputs"]


@dataclass(frozen=True)
class Experience:
    """Inputs of an update; B rows, P prompt and T response positions, A actions.

    An action is a token or a turn (A = T), or the whole response (A = 1). `advantages` are whitened over the whole
    rollout; `returns` are taken before whitening.
    """

    prompts: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P]
    responses: Tensor  # [B, T]
    response_mask: Tensor  # [B, T]
    action_mask: Tensor  # [B, A]
    old_logprobs: Tensor  # [B, A]
    old_values: Tensor  # [B, A]
    advantages: Tensor  # [B, A]
    returns: Tensor  # [B, A]

    def __len__(self) -> int:
        return self.responses.shape[0]

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive pieces of at most `size` rows."""
        for rows in torch.split(torch.arange(len(self)), size):
            yield self.select(rows)


class Policy(nn.Module):
    """A LoRA policy and its value head, initialised to 0 (Huang et al., detail 4), over one shared backbone."""

    def __init__(self, model: PeftModel, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.value_head = nn.Linear(_width(model), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_head.to(next(model.parameters()).device)

    def forward(self, batch: Experience) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies of the response tokens, each [B, T] float32."""
        out = self.model(**model_inputs(batch), output_hidden_states=True)
        logits = out.logits.float()
        values = self.value_head(out.hidden_states[-1][:, batch.prompts.shape[1] - 1 :].float()).squeeze(-1)
        with torch.no_grad():
            entropy = entropy_from_logits(logits, self.temperature)
        logprobs = logprobs_from_logits(logits, batch.responses, self.temperature, inplace_backward=True)
        return logprobs, values, entropy

    @torch.no_grad()
    def reference_logprobs(self, batch: Experience | Rollout) -> Tensor:
        """Log-probabilities [B, T] of the response tokens under the reference: the backbone with the adapter off."""
        with self.model.disable_adapter():
            logits = self.model(**model_inputs(batch)).logits.float()
        return logprobs_from_logits(logits, batch.responses, self.temperature)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name: adapter and value head."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def model_inputs(batch: Experience | Rollout) -> dict[str, Any]:
    """Model inputs such that logits[:, t] predicts response token t; so the last response token is no input.

    The environment's tokens between the policy's turns are inputs too; only the losses mask them.
    """
    mask = torch.cat([batch.prompt_mask, through_last_true(batch.response_mask)[:, :-1]], dim=1)
    return {
        "input_ids": torch.cat([batch.prompts, batch.responses[:, :-1]], dim=1),
        "attention_mask": mask.long(),
        "position_ids": position_ids(mask),
        "logits_to_keep": batch.responses.shape[1],
        "use_cache": False,
    }


def _width(model: PeftModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.embedding_dim)
