"""A bandit whose optimum is known: one token is the whole response, and each token has its reward.

The policy that maximises E[r] − β · KL(π ‖ π_ref) is π* ∝ π_ref · exp(r / β) (Ziegler et al. 2019, arXiv 1909.08593,
section 2; Rafailov et al. 2023, arXiv 2305.18290, equation 4). Whatever is wrong in the reward, the KL penalty, the
advantages or the update, the policy settles elsewhere.
"""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tasks.config.rl import RLParams
from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.rl.callbacks import Callback
from tests.conftest import EOS, PAD, VOCABULARY, tiny_model
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, trainer_of

PROMPT = [3, 4]
REWARDS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(7))
CLOSE = 0.05
"""Total variation distance that counts as reached."""


def flexible_policy() -> PeftModel:
    """An adapter on every layer and on the head: able to express any distribution over the next token."""
    modules = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
    return get_peft_model(tiny_model(), LoraConfig(r=16, lora_alpha=16, target_modules=modules)).eval()


def distribution(model: PeftModel) -> Tensor:
    """π(· | prompt), [V] float64."""
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([PROMPT])).logits[0, -1].double(), dim=-1)


def optimum(reference: Tensor, beta: float) -> Tensor:
    weights = reference * torch.exp(REWARDS.double() / beta)
    return weights / weights.sum()


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation: ½ Σ |p − q|."""
    return float((one - other).abs().sum() / 2)


def paid(tokens: int) -> Callable[[list[str], list[str]], list[float]]:
    """The sum of the rewards of a response's tokens; its end token shows by the words that are missing to `tokens`."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        words = [[int(word) for word in text.split()] for text in responses]
        return [float(REWARDS[ids if len(ids) == tokens else [*ids, EOS]].sum()) for ids in words]

    return reward


def distribution_of_two(model: PeftModel) -> Tensor:
    """π(first, second | prompt), [V, V] float64; a first token that ends the response has all its weight on padding."""
    first = distribution(model)
    with torch.no_grad():
        prompts = torch.tensor([[*PROMPT, token] for token in range(VOCABULARY)])
        second = torch.softmax(model(prompts).logits[:, -1].double(), dim=-1)
    second[EOS] = torch.nn.functional.one_hot(torch.tensor(PAD), VOCABULARY)
    return first.unsqueeze(1) * second


def best_of_two(reference: Tensor, beta: float) -> Tensor:
    """π* over responses of at most two tokens: the reference, weighted by the reward of both."""
    second = REWARDS.double().clone().expand(VOCABULARY, -1).clone()
    second[EOS] = 0.0
    weights = reference * torch.exp((REWARDS.double().unsqueeze(1) + second) / beta)
    return weights / weights.sum()


BANDIT = {
    "updates": 150, "prompts_per_update": 1, "samples_per_prompt": 256, "micro_batch_size": 256,
    "missing_eos_penalty": 0.0, "learning_rate": 0.01,
}  # fmt: skip


ALL_PARAMETERS_RATE = 0.002
"""Of an adapter's, a fifth: every parameter moves by the rate in a step of Adam."""


def trained(params: RLParams, tokens: int = 1, recorder: Callback | None = None) -> tuple[Tensor, Tensor]:
    """The distributions of the reference and of the policy after training, over responses of so many tokens."""
    torch.manual_seed(0)
    model = flexible_policy()
    shown = distribution if tokens == 1 else distribution_of_two
    reference = shown(model)
    generation = GenerationParams(max_new_tokens=tokens, temperature=1.0)
    prompts = [Prompt(id="p", prompt=" ".join(map(str, PROMPT)))]
    trainer_of(params, model, paid(tokens), prompts=prompts, generation=generation, recorder=recorder).train()
    return reference, shown(model)


def trained_by_ppo(
    beta: float, tokens: int = 1, recorder: Callback | None = None, **changes: object
) -> tuple[Tensor, Tensor]:
    return trained(ppo_params(beta, **changes), tokens, recorder)


def ppo_params(beta: float, **changes: object) -> RLParams:
    settings = BANDIT | {"epochs": 2, "kl_controller": "fixed", "kl_coef": beta} | changes
    return PARAMS.model_copy(update=settings)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_ppo_reaches_the_optimum_of_its_own_beta_and_of_no_other(beta: float) -> None:
    reference, policy = trained_by_ppo(beta)
    reached = distance(policy, optimum(reference, beta))
    assert reached < CLOSE
    for other in (beta / 2, beta * 2):
        assert distance(policy, optimum(reference, other)) > 2 * reached, f"hardly closer to β = {beta} than to {other}"
    assert distance(policy, reference) > 3 * CLOSE


@pytest.mark.parametrize("beta", [1.0, *(pytest.param(beta, marks=pytest.mark.slow) for beta in (0.5, 2.0))])
def test_ppo_in_all_parameters_reaches_the_same_optimum(beta: float) -> None:
    """The reference is a second model; were it the policy itself, there would be no KL, and all weight on one token."""
    params = ppo_params(beta, learning_rate=ALL_PARAMETERS_RATE)
    model, frozen = tiny_model().requires_grad_(True), tiny_model()
    reference, start = distribution(frozen), {name: weight.clone() for name, weight in frozen.named_parameters()}
    prompts = [Prompt(id="p", prompt=" ".join(map(str, PROMPT)))]
    generation = GenerationParams(max_new_tokens=1, temperature=1.0)
    trainer_of(params, model, paid(1), prompts=prompts, generation=generation, reference=frozen).train()
    reached = distance(distribution(model), optimum(reference, beta))
    assert reached < CLOSE
    for other in (beta / 2, beta * 2):
        assert distance(distribution(model), optimum(reference, other)) > 2 * reached
    assert all(torch.equal(weight, start[name]) for name, weight in frozen.named_parameters()), "it must not learn"
    assert not any(torch.equal(weight, start[name]) for name, weight in model.named_parameters()), "all must learn"


LEAVE_ONE_OUT = {"advantage": "leave_one_out", "value_coef": 0.0}
VARIANTS = {
    "a response as one action": {"action": "response"},
    "leave-one-out, a response as one action": {"action": "response"} | LEAVE_ONE_OUT,
    "leave-one-out, tokens as actions": LEAVE_ONE_OUT,
    "A2C": {"epochs": 1, "clip_range": None, "value_clip_range": None, "learning_rate": 0.02},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.slow
def test_each_variant_reaches_the_optimum_over_whole_responses(changes: dict[str, object]) -> None:
    """Responses of one or two tokens, paid for both: 993 of them, and π* is known for each (see `best_of_two`)."""
    reference, policy = trained_by_ppo(1.0, tokens=2, **changes)
    best = best_of_two(reference, 1.0)
    assert distance(policy, best) < 2 * CLOSE
    assert distance(policy, reference) > 6 * CLOSE


@pytest.mark.slow
def test_adaptive_kl_reaches_its_target_and_the_optimum_that_has_it() -> None:
    """KL(π* ‖ π_ref) falls with β, so a target names one β: the controller must find it, and the policy its optimum.

    The KL of a single update swings about the target with the controller; the mean of the last hundred does not.
    """
    beta, horizon = 1.0, 2560
    model = flexible_policy()
    start = distribution(model)
    best = optimum(start, beta)
    target = float((best * (best / start).log()).sum())
    measured: list[float] = []

    class KLRecorder(Callback):
        def on_log(self, metrics: dict[str, float], update: int) -> None:
            measured.append(metrics["kl"])

    _, policy = trained_by_ppo(
        3 * beta, updates=400, kl_controller="adaptive", adaptive_kl_target=target, kl_horizon=horizon,
        recorder=KLRecorder(),
    )  # fmt: skip
    reached = sum(measured[-100:]) / 100
    assert reached == pytest.approx(target, rel=0.05)
    assert distance(policy, best) < CLOSE


def group_optimum(reference: Tensor, beta: float) -> Tensor:
    """GRPO divides rewards by their deviation σ in the group, so it solves for β·σ, with σ that of its own answer."""
    policy, rewards = reference, REWARDS.double()
    for _ in range(200):
        deviation = (policy @ (rewards - policy @ rewards) ** 2).sqrt()
        policy = optimum(reference, beta * float(deviation))
    return policy


@pytest.mark.parametrize("beta", [1.0, *(pytest.param(beta, marks=pytest.mark.slow) for beta in (2.0, 4.0))])
def test_grpo_reaches_the_optimum_of_its_own_beta_and_of_no_other(beta: float) -> None:
    params = GRPO_PARAMS.model_copy(update=BANDIT | {"epochs": 1, "kl_coef": beta})
    reference, policy = trained(params)
    reached = distance(policy, group_optimum(reference, beta))
    assert reached < CLOSE
    for other in (beta / 2, beta * 2):
        assert distance(policy, group_optimum(reference, other)) > 2 * reached, f"hardly closer than to {other}"
    assert distance(policy, reference) > 2 * CLOSE


def optimum_with_entropy(reference: Tensor, beta: float, alpha: float) -> Tensor:
    """π* of E[r] − β · KL + α · H: ∝ π_ref^(β/(α+β)) · exp(r / (α + β))."""
    weights = reference ** (beta / (alpha + beta)) * torch.exp(REWARDS.double() / (alpha + beta))
    return weights / weights.sum()


UNSCALED = {"scale_rewards": "none", "kl_coef": 1.0}
GRPO_VARIANTS: dict[str, tuple[dict[str, object], Callable[[Tensor], Tensor]]] = {
    "scale none": (UNSCALED, lambda reference: optimum(reference, 1.0)),
    "KL in the reward": (UNSCALED | {"kl_penalty": "reward"}, lambda reference: optimum(reference, 1.0)),
    "entropy": (UNSCALED | {"entropy_coef": 0.5}, lambda reference: optimum_with_entropy(reference, 1.0, 0.5)),
    "scale batch": ({"scale_rewards": "batch"}, lambda reference: group_optimum(reference, 1.0)),
    "dapo with clip-higher and dual clip": (
        {"loss_type": "dapo", "epochs": 2, "clip_range_high": 0.28, "dual_clip": 3.0},
        lambda reference: group_optimum(reference, 1.0),
    ),
    "cispo": (
        {"loss_type": "cispo", "epochs": 2, "clip_range": None, "clip_range_high": 4.0},
        lambda reference: group_optimum(reference, 1.0),
    ),
    "gspo": ({"importance_level": "sequence", "epochs": 2}, lambda reference: group_optimum(reference, 1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "best"), GRPO_VARIANTS.values(), ids=GRPO_VARIANTS)
def test_each_variant_of_grpo_reaches_its_optimum(changes: dict[str, object], best: Callable[[Tensor], Tensor]) -> None:
    settings: dict[str, object] = BANDIT | {"epochs": 1, "kl_coef": 1.0} | changes
    reference, policy = trained(GRPO_PARAMS.model_copy(update=settings))
    print(f"{distance(policy, best(reference)):.4f} {distance(policy, reference):.3f}")
    assert distance(policy, best(reference)) < CLOSE
    assert distance(policy, reference) > 2 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({"advantage": "return", "value_coef": 0.0}, lambda reference: optimum(reference, 1.0)),
        ({"value_lam": 1.0, "dual_clip": 3.0}, lambda reference: optimum(reference, 1.0)),
        # Whitened advantages: the loss weighs KL against rewards of deviation 1, as GRPO's does.
        ({"kl_penalty": "loss"}, lambda reference: group_optimum(reference, 1.0)),
    ],
    ids=["return", "decoupled λ", "KL in the loss"],
)
def test_each_variant_of_ppo_reaches_its_optimum(changes: dict[str, object], best: Callable[[Tensor], Tensor]) -> None:
    reference, policy = trained_by_ppo(1.0, **changes)
    print(f"{distance(policy, best(reference)):.4f} {distance(policy, reference):.3f}")
    assert distance(policy, best(reference)) < CLOSE
    assert distance(policy, reference) > 2 * CLOSE
