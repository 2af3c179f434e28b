"""PPO raises a reward that it can raise, and the KL penalty holds it back."""

from __future__ import annotations

import torch

from tasks.config.training import GenerationParams
from tasks.rewards.composition import CompositeReward
from tasks.rl.policy import Policy
from tasks.rl.trainer import PPOTrainer
from tests.conftest import tiny_policy
from tests.unit.rl.test_ppo import CODEC, PARAMS, low_tokens


def final(kl_coef: float) -> dict[str, float]:
    torch.manual_seed(0)
    params = PARAMS.model_copy(
        update={
            "updates": 30,
            "samples_per_prompt": 8,
            "micro_batch_size": 48,
            "kl_controller": "fixed",
            "kl_coef": kl_coef,
        }
    )
    ppo = PPOTrainer(
        Policy(tiny_policy(), temperature=1.0),
        CODEC,
        CompositeReward({"rule": low_tokens}, {"rule": 1.0}),
        params,
        GenerationParams(max_new_tokens=8, temperature=1.0),
        seed=0,
    )
    ppo.train()
    last = ppo.history[-5:]
    return {name: sum(row[name] for row in last) / len(last) for name in ("reward", "kl")} | {
        "start": ppo.history[0]["reward"]
    }


def test_reward_rises_and_a_larger_kl_coefficient_keeps_the_policy_closer():
    free, held = final(kl_coef=0.01), final(kl_coef=0.5)
    assert free["reward"] > free["start"] + 0.25
    assert free["reward"] > held["reward"]
    assert free["kl"] > 2 * held["kl"]
