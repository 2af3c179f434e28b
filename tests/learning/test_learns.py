"""Training raises a reward that it can raise, and the KL penalty holds it back, in PPO's reward and in GRPO's loss."""

import pytest

from tasks.config.rl import RLParams
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, trainer


def final(params: RLParams, kl_coef: float) -> dict[str, float]:
    """Means over the last five updates, and the first update's reward."""
    run = trainer(params, updates=30, samples_per_prompt=8, micro_batch_size=48, kl_controller="fixed", kl_coef=kl_coef)
    run.train()
    last = run.history[-5:]
    return {name: sum(row[name] for row in last) / len(last) for name in ("reward", "kl")} | {
        "start": run.history[0]["reward"]
    }


@pytest.mark.parametrize("params", [PARAMS, GRPO_PARAMS], ids=["ppo", "grpo"])
def test_reward_rises_and_a_larger_kl_coefficient_keeps_the_policy_closer(params: RLParams) -> None:
    free, held = final(params, kl_coef=0.01), final(params, kl_coef=0.5)
    assert free["reward"] > free["start"] + 0.25
    assert free["reward"] > held["reward"]
    assert free["kl"] > 2 * held["kl"]
