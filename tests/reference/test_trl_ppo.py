"""What TRL 1.12.0 computed in a PPO run of its own, fed to our functions; `record_trl_ppo.py` recorded it.

Where TRL's conventions are others, the test says which, and compares with that difference taken out:

- The score stands on the position after a response's last token where there is one, and the value function is trained
  on that position too; ours stands on the last token. In the case `full` there is no such position.
- Whitening divides by the unbiased variance, n/(n − 1) times ours.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.rl.advantages import gae, token_rewards
from tasks.rl.kl import kl_estimates
from tasks.rl.losses import policy_loss, value_loss
from tasks.rl.masking import whiten

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("trl_1_12_0_ppo.json").read_text(encoding="utf-8"))
EXACT: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
"""TRL computed in float32."""

Case = tuple[dict[str, float], Callable[[str], Tensor], Callable[[str], Tensor]]


@pytest.fixture(params=["full", "cut"])
def case(request: pytest.FixtureRequest) -> Case:
    """Options, and the tensors of the rollout and of the last optimiser step by name."""
    recorded = RECORDED["cases"][request.param]
    options, rollout, step = recorded["options"], recorded["rollout"], recorded["step"]

    def tensors(of: dict[str, Any]) -> Callable[[str], Tensor]:
        return lambda name: torch.tensor(of[name], dtype=torch.bool if "mask" in name else torch.float64)

    return options, tensors(rollout), tensors(step)


def test_it_was_recorded_from_the_release_that_had_ppo() -> None:
    assert RECORDED["made_with"]["trl"] == "1.12.0"
    lengths = {name: torch.tensor(item["rollout"]["mask"]).sum(1) for name, item in RECORDED["cases"].items()}
    assert lengths["full"].min() == 5
    assert lengths["cut"].min() < 5 <= lengths["cut"].max(), "the case `cut` must hold long and short responses"


def test_kl_and_rewards(case: Case) -> None:
    options, rollout, _ = case
    mask, scores, theirs = rollout("mask"), rollout("scores"), rollout("rewards")
    kl = kl_estimates(rollout("logprobs"), rollout("ref_logprobs"), mask).k1
    torch.testing.assert_close(kl[mask], rollout("kl")[mask], **EXACT)
    ours = token_rewards(scores, kl, mask, kl_coef=options["kl_coef"])
    for row, length in enumerate(mask.sum(1).tolist()):
        if length < mask.shape[1]:  # their score stands one position later
            theirs[row, length - 1] += theirs[row, length]
            torch.testing.assert_close(theirs[row, length], scores[row], **EXACT)
            theirs[row, length:] = 0
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_advantages_and_returns(case: Case) -> None:
    """On their rewards and values, over the positions that they count: one more than ours in a short response."""
    options, rollout, _ = case
    mask = rollout("mask")
    counted = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1) | mask
    advantages, returns = gae(
        rollout("rewards"), rollout("values"), counted, gamma=options["gamma"], lam=options["lam"]
    )
    torch.testing.assert_close(advantages[mask], rollout("advantages")[mask], **EXACT)
    torch.testing.assert_close(returns[counted], rollout("returns")[counted], **EXACT)


def test_whitening(case: Case) -> None:
    _, rollout, _ = case
    mask = rollout("mask")
    count = mask.sum().item()
    ours = whiten(rollout("advantages"), mask) * ((count - 1) / count) ** 0.5
    torch.testing.assert_close(ours[mask], rollout("whitened")[mask], **EXACT)


def test_policy_loss_and_clip_fraction_after_the_policy_has_moved(case: Case) -> None:
    options, _, step = case
    mask = step("mask")
    ours = policy_loss(
        step("new_logprobs"), step("mb_logprobs"), step("mb_advantage"), mask,
        clip_range=options["cliprange"], token_count=int(mask.sum()),
    )  # fmt: skip
    assert ours.clipped > 0.1 * ours.tokens, "nothing was clipped, so this shows little"
    torch.testing.assert_close(ours.loss, step("pg_loss"), **EXACT)
    assert ours.metrics()["clip_fraction"] == pytest.approx(step("pg_clipfrac").item(), abs=1e-5)


def test_value_loss_and_clip_fraction(case: Case) -> None:
    options, _, step = case
    mask = step("value_mask")
    ours = value_loss(
        step("vpred"), step("mb_values"), step("mb_return"), mask,
        value_clip_range=options["cliprange_value"], token_count=int(mask.sum()),
    )  # fmt: skip
    assert ours.clipped > 0.1 * ours.tokens, "nothing was clipped, so this shows little"
    torch.testing.assert_close(ours.loss, step("vf_loss"), **EXACT)
    assert ours.metrics()["value_clip_fraction"] == pytest.approx(step("vf_clipfrac").item(), abs=1e-5)
