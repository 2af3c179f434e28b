"""The RL trainer on a two-layer model, with prompts and responses as texts of token numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from tasks.config.rl import GRPOParams, PPOParams, RLParams
from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward
from tasks.rl.algorithm import Algorithm, Experience, Metrics
from tasks.rl.callbacks import Callback, Checkpoint
from tasks.rl.grpo import GRPO
from tasks.rl.policy import Policy
from tasks.rl.ppo import PPO
from tasks.rl.rollout import LocalSampler
from tasks.rl.trainer import RLTrainer
from tests.conftest import EOS, PAD, tiny_policy

_SHARED: dict[str, Any] = {
    "updates": 4, "prompts_per_update": 6, "samples_per_prompt": 2, "epochs": 2, "minibatches": 1,
    "micro_batch_size": 12, "learning_rate": 1e-2, "clip_range": 0.2, "max_grad_norm": 1.0, "kl_coef": 0.05,
    "missing_eos_penalty": 0.5, "checkpoint_every": 2, "snapshot_every": 2,
}  # fmt: skip
PARAMS = PPOParams(
    **_SHARED, action="token", advantage="gae", gamma=1.0, lam=0.95, value_clip_range=0.2, value_coef=0.1,
    kl_controller="adaptive", adaptive_kl_target=1.0, kl_horizon=100, target_kl=10.0,
)  # fmt: skip
GRPO_PARAMS = GRPOParams(**_SHARED, loss_type="grpo")
GENERATION = GenerationParams(max_new_tokens=8, temperature=1.0)
PROMPTS = [Prompt(id=str(i), prompt=" ".join(map(str, [3 + i, *range(4, 4 + i % 4)]))) for i in range(10)]


class NumberTokenizer:
    """The text of tokens is their numbers."""

    eos_token_id, pad_token_id, bos_token_id = EOS, PAD, None

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        ids = [int(word) for word in text.split() if word.isdigit()]
        return SimpleNamespace(input_ids=ids, special_tokens_mask=[0] * len(ids))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class Recorder(Callback):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.logged: list[int] = []
        self.warnings: list[str] = []
        self.ended: list[int] = []
        self.then: Callable[[], None] = lambda: None

    def on_update_end(self, update: int) -> None:
        self.ended.append(update)
        self.then()

    def on_log(self, metrics: Metrics, update: int) -> None:
        self.logged.append(update)

    def on_warning(self, message: str) -> None:
        self.warnings.append(message)


def moved_policy() -> PeftModel:
    """The tiny policy with an adapter that changes something."""
    policy = tiny_policy()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return policy


def low_tokens(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward: the share of tokens below 16."""
    return [sum(int(word) < 16 for word in text.split()) / max(1, len(text.split())) for text in responses]


def algorithm_of(params: RLParams, generation: GenerationParams = GENERATION, turn_gamma: float = 1.0) -> Algorithm:
    if isinstance(params, PPOParams):
        return PPO(params, max_new_tokens=generation.max_new_tokens, turn_gamma=turn_gamma)
    assert isinstance(params, GRPOParams)
    return GRPO(params, max_new_tokens=generation.max_new_tokens, turn_gamma=turn_gamma)


def trainer_of(
    params: RLParams,
    model: PeftModel,
    reward: Any,
    *,
    tokenizer: Any = None,
    prompts: Sequence[Prompt] = PROMPTS,
    generation: GenerationParams = GENERATION,
    seed: int = 0,
    checkpoints: Path | None = None,
    recorder: Callback | None = None,
    reference: Any = None,
) -> RLTrainer:
    """The trainer of a policy, by the algorithm of the parameters."""
    has_values = getattr(params, "has_values", False)
    policy = Policy(model, temperature=generation.temperature, value_head=has_values, reference=reference)
    sampler = LocalSampler(model, tokenizer or NumberTokenizer(), generation, policy.value_head)
    return RLTrainer(
        policy, sampler, prompts, CompositeReward({"rule": reward}, {"rule": 1.0}), algorithm_of(params, generation),
        seed=seed, checkpoint=Checkpoint(checkpoints), callbacks=[recorder or Recorder()],
    )  # fmt: skip


def trainer(
    params: RLParams = PARAMS, *, reward: Any = low_tokens, checkpoints: Path | None = None,
    recorder: Callback | None = None, **changes: Any,
) -> RLTrainer:  # fmt: skip
    """The trainer of the tiny policy, with changed parameters."""
    torch.manual_seed(0)
    changed = params.model_copy(update=changes)
    return trainer_of(changed, tiny_policy(), reward, checkpoints=checkpoints, recorder=recorder)


def weights(of: RLTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in of.policy.trainable_parameters().items()}


def assert_same_weights(one: RLTrainer, other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for name, value in weights(one).items():
        assert torch.equal(other[name], value), name


def experience_of(of: RLTrainer) -> tuple[Experience, Metrics]:
    """What an update would learn from, and all metrics of its rollout."""
    scored = of.score(of.sample())
    experience, metrics = of.algorithm.compute_advantages(scored)
    return experience, of._rollout_metrics(scored) | metrics


def gradients(of: RLTrainer) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in of.policy.trainable_parameters().items()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
