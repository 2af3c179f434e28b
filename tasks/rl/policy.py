"""Policy (adapter on), reference (adapter off) and value function (a linear head) on one shared backbone.

Where all parameters are trained, the reference is a model of its own.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.models.loading import position_ids
from tasks.rl.losses import entropy_from_logits, logprobs_from_logits
from tasks.rl.masking import through_last_true
from tasks.rl.rollout import TokenBatch

__all__ = ["Policy", "PolicyOutput", "model_inputs"]


class PolicyOutput(NamedTuple):
    """Log-probability, value and entropy per response token, [B, T] float32; values are 0 without a value head."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """A policy, with a value head or without, over one shared backbone.

    `reference` is frozen; None: `model` is an adapter, and the reference what it lies on.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        *,
        temperature: float,
        value_head: bool = True,
        reference: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.reference = model, temperature, reference
        self.value_head = _zero_head(model) if value_head else None

    def forward(self, batch: TokenBatch, *, entropy_gradient: bool = False) -> PolicyOutput:
        """Log-probabilities, values and entropies of the response tokens; the entropies with a gradient on request."""
        logits, values = self._logits_and_values(batch)
        with torch.set_grad_enabled(entropy_gradient):
            entropy = entropy_from_logits(logits, self.temperature)
        logprobs = logprobs_from_logits(
            logits, batch.responses, self.temperature, inplace_backward=not entropy_gradient
        )
        return PolicyOutput(logprobs, values, entropy)

    def _logits_and_values(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        out = self.model(**model_inputs(batch), output_hidden_states=self.value_head is not None)
        logits = out.logits.float()
        values = logits.new_zeros(batch.responses.shape)
        if self.value_head is not None:
            values = self.value_head(out.hidden_states[-1][:, batch.prompts.shape[1] - 1 :].float()).squeeze(-1)
        return logits, values

    def demonstration_logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities [B, T] of the response tokens at temperature 1, as in SFT, with a gradient."""
        return logprobs_from_logits(self._logits_and_values(batch)[0], batch.responses, 1.0)

    @torch.no_grad()
    def logprobs_and_values(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values [B, T] of the response tokens, without gradients and entropies."""
        logits, values = self._logits_and_values(batch)
        return logprobs_from_logits(logits, batch.responses, self.temperature), values

    @torch.no_grad()
    def entropies(self, batch: TokenBatch) -> Tensor:
        """Entropy [B, T] of the policy at each response token, nats."""
        return self(batch).entropy

    @torch.no_grad()
    def reference_logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities [B, T] of the response tokens under the reference: a model, or the backbone's own."""
        model: Any = self.reference or self.model
        with model.disable_adapter() if self.reference is None else nullcontext():
            logits = model(**model_inputs(batch)).logits.float()
        return logprobs_from_logits(logits, batch.responses, self.temperature)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained by name: adapter, or all of the model, and value head."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def model_inputs(batch: TokenBatch) -> dict[str, Any]:
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


def _zero_head(model: PeftModel | PreTrainedModel) -> nn.Linear:
    """A value head of zeros (Huang et al., detail 4)."""
    embeddings: Any = model.get_input_embeddings()
    head = nn.Linear(int(embeddings.embedding_dim), 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(next(model.parameters()).device)
