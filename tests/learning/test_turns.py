"""Two turns whose optimum is known: a letter, the environment's answer to it, another letter, and the reward of both.

With V_2(s) = β · log Σ_a π_ref(a|s) · exp(r(a) / β) the best second turn is π_ref · exp(r / β) and the best first one
π_ref · exp(γ · V_2 / β): soft Bellman equations (Haarnoja et al. 2017, arXiv 1702.08165, equations 3 to 5), with the KL
penalty of the second turn discounted like its reward. A first turn is thus only as good as what the second can make of
it: whoever credits a turn wrongly, discounts it wrongly, or learns the environment's words, ends elsewhere.
"""

import pytest
import torch
from torch import Tensor

from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward
from tasks.rl.callbacks import Checkpoint
from tasks.rl.environments import Step
from tasks.rl.multi_turn import MultiTurnSampler
from tasks.rl.policy import Policy
from tasks.rl.ppo import PPO
from tasks.rl.rollout import LocalSampler
from tasks.rl.trainer import RLTrainer
from tests.conftest import EOS, LETTERS, PAD, VOCABULARY, letter_tokenizer
from tests.learning.test_bandit import BANDIT, distance, flexible_policy
from tests.support.tiny_trainer import PARAMS

SIGNS = f"{LETTERS}123"
TOKENIZER = letter_tokenizer(SIGNS)
ROW = Prompt(id="p", prompt="ab")
SHOWN = ["", "", " ", *SIGNS[1:]]
"""Token id → the turn that holds this token alone; padding and end token show nothing."""

SECOND_REWARDS = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SECOND_REWARDS[:, PAD] = SECOND_REWARDS[:, EOS]
SECOND_REWARDS += torch.tensor([[1.5], [0.0], [-1.5]])
"""Reward of the second turn, by the environment's answer: the first answer is the best."""


class Riddle:
    """Answers a, b or c by the first turn's sign, and pays the second turn by its own sign and that answer."""

    def __init__(self) -> None:
        self._kind: int | None = None

    def reset(self, row: Prompt) -> str:
        return row.prompt

    def step(self, action: str) -> Step:
        sign = SHOWN.index(action)
        if self._kind is None:
            self._kind = sign % 3 if sign else EOS % 3
            return Step("abc"[self._kind], 0.0, done=False)
        return Step("", float(SECOND_REWARDS[self._kind, sign]), done=True)


KINDS = torch.tensor([EOS % 3, *(sign % 3 for sign in range(1, VOCABULARY))])


def policy_of(model: object) -> tuple[Tensor, Tensor]:
    """π(first), [V], and π(second | first), [V, V], float64."""
    prompt = TOKENIZER(ROW.prompt).input_ids
    inputs = torch.tensor([[*prompt, first, *TOKENIZER("abc"[KINDS[first]]).input_ids] for first in range(VOCABULARY)])
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
        return first, torch.softmax(model(inputs).logits[:, -1].double(), -1)


def optimum(first: Tensor, second: Tensor, beta: float, gamma: float) -> Tensor:
    """The best distribution over both turns, [V, V]."""
    weights = second * torch.exp(SECOND_REWARDS[KINDS] / beta)
    state_values = beta * weights.sum(1).log()
    opening = first * torch.exp(gamma * state_values / beta)
    return (opening / opening.sum()).unsqueeze(1) * weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("action", "gamma"), [("turn", 1.0), ("turn", 0.5), ("token", 1.0)])
def test_ppo_reaches_the_optimum_of_two_turns(action: str, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.rl.multi_turn.user_turn", lambda text: text)
    beta = 1.0
    changes = {"updates": 50, "epochs": 2, "kl_controller": "fixed", "kl_coef": beta, "action": action}
    params = PARAMS.model_copy(update=BANDIT | changes | {"value_coef": 0.5, "value_clip_range": None})
    torch.manual_seed(0)
    model = flexible_policy()
    reference = policy_of(model)
    policy = Policy(model, temperature=1.0)
    generation = GenerationParams(max_new_tokens=1, temperature=1.0)
    sampler = MultiTurnSampler(LocalSampler(model, TOKENIZER, generation, policy.value_head), Riddle, max_turns=2)
    reward, algorithm = CompositeReward({}, {"environment": 1.0}), PPO(params, max_new_tokens=4, turn_gamma=gamma)
    RLTrainer(policy, sampler, [ROW], reward, algorithm, seed=0, checkpoint=Checkpoint(None)).train()
    first, second = policy_of(model)
    learned, start = first.unsqueeze(1) * second, reference[0].unsqueeze(1) * reference[1]
    reached = distance(learned, optimum(*reference, beta, gamma))
    assert reached < 0.1
    assert distance(learned, start) > 0.3
    other = optimum(*reference, beta, 0.5 if gamma == 1 else 1.0)
    assert distance(learned, other) > 1.5 * reached, "hardly closer to the optimum of its own discount"
