"""Multi-turn rollouts of a policy with an environment.

Token by token a conversation is prompt, turn, answer, turn, …, turn. The ids of the policy's turns are kept as they
were sampled; each answer is tokenised by itself and never again together with what stands around it. So the forward
pass of the update reads exactly the tokens that the rollout wrote. `response_mask` is true on the policy's own tokens
alone, and nothing follows the last of them: the environment's final turn is kept for people to read.

Multi-turn policy gradients with masked environment tokens: Zhou et al. 2024 (ArCHer, arXiv 2402.19446).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tasks.config.base import ENVIRONMENT
from tasks.core import distributed
from tasks.core.rows import Prompt
from tasks.models.batching import pad_ids
from tasks.rl.advantages import turn_counts
from tasks.rl.environments.base import Environment, final_user_turn, user_turn
from tasks.rl.environments.kinds import ENVIRONMENTS
from tasks.rl.rollout import Rollout, generate

if TYPE_CHECKING:
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = ["EnvironmentReward", "MultiTurnRollout", "MultiTurnSampler", "load_multi_turn_sampler"]


@dataclass(frozen=True)
class EnvironmentReward:
    """Reward component of finished conversations: their known rewards and numbers of turns."""

    rewards: Tensor
    turns: Tensor

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards [B]; metrics: whether the reward is positive, and the number of the policy's turns."""
        return self.rewards, {"success": (self.rewards > 0).float(), "turns": self.turns.float()}


@dataclass(frozen=True)
class MultiTurnRollout(Rollout):
    """A rollout whose responses are whole conversations after their first prompt; `has_eos`: no turn was truncated.

    Attributes:
        prompt_texts: the prompts.
        policy_texts: the policy's own turns, one a line.
        transcripts: all text after the prompt, the environment's final turn included.
        rewards: [B] of the environment, on the CPU.
    """

    prompt_texts: list[str]
    policy_texts: list[str]
    transcripts: list[str]
    rewards: Tensor

    def gather(self, pad_token_id: int) -> MultiTurnRollout:
        """Gather the rollouts of all ranks, in order of rank."""
        return MultiTurnRollout(
            **vars(super().gather(pad_token_id)),
            prompt_texts=distributed.all_gather_texts(self.prompt_texts),
            policy_texts=distributed.all_gather_texts(self.policy_texts),
            transcripts=distributed.all_gather_texts(self.transcripts),
            rewards=distributed.all_gather(self.rewards),
        )

    @property
    def turns(self) -> Tensor:
        """Number of the policy's turns, [B], on the CPU."""
        return turn_counts(self.response_mask).cpu()

    def texts(self, decode: Callable[[Sequence[int]], str]) -> list[str]:
        """The policy's own turns."""
        return self.policy_texts

    def display_texts(self, responses: list[str]) -> list[str]:
        """Full transcripts."""
        return self.transcripts

    @property
    def external_rewards(self) -> Mapping[str, Any]:
        """The environment's reward component."""
        return {ENVIRONMENT: EnvironmentReward(self.rewards, self.turns)}


class MultiTurnSampler:
    """Samples conversations of a policy with environments, one environment each."""

    def __init__(
        self,
        environment: Callable[[], Environment],
        rows: Sequence[Prompt],
        tokenizer: Any,
        generation: GenerationParams,
        *,
        max_turns: int,
        gamma: float,
    ) -> None:
        self._environment, self._rows, self._tokenizer = environment, rows, tokenizer
        self._generation, self._max_turns, self.gamma = generation, max_turns, gamma

    def __call__(
        self,
        model: Any,
        indices: Sequence[int],
        samples_per_prompt: int,
        generator: Callable[[int], torch.Generator],
        *,
        value_head: nn.Module | None = None,
    ) -> MultiTurnRollout:
        """Conversations of this rank: row b·samples_per_prompt + g is sample g of the row `indices[b]`.

        Every turn is sampled by `generate` from the whole conversation so far; the first one shares the prompts among
        their samples.

        Args:
            generator: of a turn, counted from 0. A conversation's numbers do not depend on how long others last.
        """
        episodes = [
            _Episode(self._environment(), self._rows[index], self._tokenizer)
            for index in indices
            for _ in range(samples_per_prompt)
        ]
        for turn in range(self._max_turns):
            active = [position for position, episode in enumerate(episodes) if not episode.done]
            if not active:
                break
            first = turn == 0
            turns = generate(
                model,
                [episode.context for episode in (episodes[::samples_per_prompt] if first else _at(episodes, active))],
                max_new_tokens=self._generation.max_new_tokens,
                temperature=self._generation.temperature,
                eos_token_id=self._tokenizer.eos_token_id,
                pad_token_id=self._tokenizer.pad_token_id,
                generator=generator(turn),
                samples_per_prompt=samples_per_prompt if first else 1,
                value_head=value_head,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                active_rows=active,
                total_rows=len(episodes),
            )
            for row, episode in enumerate(_at(episodes, active)):
                episode.add_policy_turn(turns, row)
                episode.step_environment(last=turn + 1 == self._max_turns)
        device = next(model.parameters()).device
        return _to_rollout(episodes, self._tokenizer.pad_token_id, device)


def load_multi_turn_sampler(
    params: EnvironmentParams, rows: Sequence[Prompt], tokenizer: Any, generation: GenerationParams
) -> MultiTurnSampler:
    """Build the sampler that the `environment` section describes, on these rows."""
    environment = ENVIRONMENTS[params.kind]
    return MultiTurnSampler(environment, rows, tokenizer, generation, max_turns=params.max_turns, gamma=params.gamma)


class _Episode:
    """State of one conversation: ids after the prompt, the policy mask, log-probabilities and values."""

    def __init__(self, environment: Environment, row: Prompt, tokenizer: Any) -> None:
        self._environment, self._tokenizer = environment, tokenizer
        self.prompt = environment.reset(row)
        self.prompt_ids: list[int] = list(tokenizer(self.prompt).input_ids)
        self.ids: list[int] = []
        self.policy_mask: list[bool] = []
        self.logprobs: list[float] = []
        self.values: list[float] = []
        self.turns: list[str] = []
        self.transcript, self.reward, self.has_eos, self.done = "", 0.0, True, False

    @property
    def context(self) -> list[int]:
        return self.prompt_ids + self.ids

    def add_policy_turn(self, turns: Rollout, row: int) -> None:
        """Append a turn of the policy as it was sampled."""
        length = int(turns.response_mask[row].sum())
        self._add(
            turns.responses[row, :length].tolist(),
            turns.logprobs[row, :length].tolist(),
            turns.values[row, :length].tolist(),
            is_policy=True,
        )
        has_eos = bool(turns.has_eos[row])
        token_ids = turns.responses[row, : length - has_eos].tolist()
        self.turns.append(str(self._tokenizer.decode(token_ids, skip_special_tokens=True)))
        self.has_eos = self.has_eos and has_eos

    def step_environment(self, *, last: bool) -> None:
        """Step the environment; append its observation as tokens unless the conversation is over."""
        step = self._environment.step(self.turns[-1])
        self.reward, self.done = step.reward, step.done
        if step.done or last:
            self.transcript += self.turns[-1] + final_user_turn(step.observation)
            return
        text = user_turn(step.observation)
        self.transcript += self.turns[-1] + text
        ids = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        zeros = [0.0] * len(ids)
        self._add(ids, zeros, zeros, is_policy=False)

    def _add(self, ids: list[int], logprobs: list[float], values: list[float], *, is_policy: bool) -> None:
        self.ids += ids
        self.policy_mask += [is_policy] * len(ids)
        self.logprobs += logprobs
        self.values += values


def _at(episodes: Sequence[_Episode], places: Sequence[int]) -> list[_Episode]:
    return [episodes[place] for place in places]


def _to_rollout(episodes: Sequence[_Episode], pad_token_id: int, device: torch.device) -> MultiTurnRollout:
    def padded(name: str, fill: float = 0) -> Tensor:
        rows = [torch.tensor(getattr(episode, name)) for episode in episodes]
        return pad_sequence(rows, batch_first=True, padding_value=fill).to(device)

    prompt_ids = [episode.prompt_ids for episode in episodes]
    prompts, prompt_mask = (tensor.to(device) for tensor in pad_ids(prompt_ids, pad_token_id, side="left"))
    return MultiTurnRollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        responses=padded("ids", pad_token_id),
        response_mask=padded("policy_mask"),
        logprobs=padded("logprobs"),
        values=padded("values"),
        has_eos=torch.tensor([episode.has_eos for episode in episodes], device=device),
        prompt_texts=[episode.prompt for episode in episodes],
        policy_texts=["\n".join(turn.strip() for turn in episode.turns) for episode in episodes],
        transcripts=[episode.transcript for episode in episodes],
        rewards=torch.tensor([episode.reward for episode in episodes]),
    )
