"""What stands in the padding, and how much of it there is, changes nothing: no loss, no gradient, no metric."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tasks.rl.advantages import gae, token_rewards
from tasks.rl.kl import kl_estimates, per_sequence
from tasks.rl.losses import kl_loss, logprobs_from_logits, policy_loss, token_weights, value_loss
from tasks.rl.masking import explained_variance, masked_mean, whiten

B, T, V = 4, 6, 7
EOS = 2
LENGTHS = [6, 1, 3, 5]


@dataclass
class Outcome:
    """Everything that an update computes; gradients only at the positions that count."""

    numbers: dict[str, float]
    logits_grad: Tensor
    values_grad: Tensor


def update(pads: int, junk: float, pad_token: int) -> Outcome:
    """One PPO update's numbers, from tokens and logits to gradients, with `pads` more columns of padding."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(3, V, (B, T), generator=generator)
    logits, reference, old, values, old_values = draw(B, T, V), draw(B, T), draw(B, T), draw(B, T), draw(B, T)
    scores = draw(B)
    for b, length in enumerate(LENGTHS):
        tokens[b, length - 1] = EOS
        tokens[b, length:] = pad_token
    tokens = torch.nn.functional.pad(tokens, (0, pads), value=pad_token)
    mask = torch.arange(T + pads) < torch.tensor(LENGTHS)[:, None]
    logits = torch.nn.functional.pad(logits, (0, 0, 0, pads)).requires_grad_()
    values, reference, old, old_values = (
        torch.nn.functional.pad(x, (0, pads)).masked_fill(~mask, junk) for x in (values, reference, old, old_values)
    )
    values.requires_grad_()

    new = logprobs_from_logits(logits, tokens, 0.7)
    count = int(mask.sum())
    kl = kl_estimates(old, reference, mask)
    rewards = token_rewards(scores, kl.k1, mask, kl_coef=0.3)
    advantages, returns = gae(rewards, old_values, mask, gamma=0.98, lam=0.9)
    gains, targets = whiten(advantages, mask).masked_fill(~mask, junk), returns.masked_fill(~mask, junk)
    actor = policy_loss(new, old, gains, mask, clip_range=0.2, token_count=count)
    critic = value_loss(values, old_values, targets, mask, value_clip_range=0.2, token_count=count)
    weights = token_weights(mask, "grpo", responses=B, tokens=count, max_new_tokens=T).masked_fill(~mask, junk)
    group = policy_loss(new, old, gains, mask, clip_range=0.2, weights=weights)
    pull = kl_loss(new, old, reference, mask, weights=weights)
    (actor.loss + 0.1 * critic.loss + group.loss + pull.loss).backward()
    assert logits.grad is not None
    assert values.grad is not None
    assert logits.grad[~mask].eq(0).all(), "a gradient reached the logits of padding"
    assert values.grad[~mask].eq(0).all(), "a gradient reached the values of padding"
    numbers = {
        **actor.metrics(),
        **critic.metrics(),
        **pull.metrics(),
        "group_loss": group.loss.item(),
        "kl_k1": per_sequence(kl.k1, mask).mean().item(),
        "kl_k2": per_sequence(kl.k2, mask).mean().item(),
        "kl_k3": per_sequence(kl.k3, mask).mean().item(),
        "reward": rewards.sum(1).mean().item(),
        "advantage": masked_mean(advantages.abs(), mask).item(),
        "explained_variance": explained_variance(old_values, returns, mask).item(),
    }
    return Outcome(numbers, logits.grad[:, :T], values.grad[:, :T])


@pytest.mark.parametrize("pads", [0, 1, 9])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30, -3.0])
@pytest.mark.parametrize("pad_token", [0, EOS, 5])
def test_padding_changes_nothing(pads: int, junk: float, pad_token: int) -> None:
    expected, found = update(0, 0.0, 0), update(pads, junk, pad_token)
    assert found.numbers == pytest.approx(expected.numbers, rel=1e-12)
    assert all(math.isfinite(value) for value in found.numbers.values())
    torch.testing.assert_close(found.logits_grad, expected.logits_grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.values_grad, expected.values_grad, rtol=1e-12, atol=1e-15)
