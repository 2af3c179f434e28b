"""Multi-turn rollouts of a policy with an environment.

Token by token a conversation is prompt, turn, answer, turn, …, turn. The ids of the policy's turns are kept as they
were sampled, and each answer is tokenised by itself, so the update reads exactly the tokens that the rollout wrote.
`response_mask` is true on the policy's own tokens alone, and nothing follows the last of them: the environment's final
turn is kept for people to read.

Multi-turn policy gradients with masked environment tokens: Zhou et al. 2024 (ArCHer, arXiv 2402.19446).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.config.base import ENVIRONMENT
from tasks.core.custom import load_custom
from tasks.core.errors import DataError
from tasks.core.rows import Prompt
from tasks.models.encoding import encode_prompt, encode_text
from tasks.models.loading import pad_ids
from tasks.rewards.rules.answers import exact_match
from tasks.rl.advantages import turn_counts
from tasks.rl.environments import Environment, Step, final_user_turn, user_turn
from tasks.rl.environments.service_bot import BookingUser
from tasks.rl.rollout import BatchRows, Rollout, Sampler, extend_generator

if TYPE_CHECKING:
    from tasks.config.training import EnvironmentParams

__all__ = ["EnvironmentReward", "MultiTurnRollout", "MultiTurnSampler", "RetryEnvironment", "with_environment"]


class RetryEnvironment:
    """Questions of reasoning-gym with retries: reward 1 for the right answer, at whichever try; γ favours an early one.

    Gamed by: trying until it fits, which `environment.max_turns` bounds; naming several numbers does not help, for the
    last one counts. The answer to a wrong try does not say in what it is wrong, so there is nothing in it to parrot. A
    wrong first try on purpose gains nothing, for the question stays the same and the reward only shrinks.
    """

    def __init__(self) -> None:
        self._expected = ""

    def reset(self, row: Prompt) -> str:
        """The row's prompt; DataError where the row has no right answer."""
        if row.answer is None:
            raise DataError(
                f"the environment reasoning_gym needs rows with an `answer`, and {row.id!r} has none: use a source of "
                "kind reasoning_gym, or map the column to `answer`"
            )
        self._expected = row.answer
        return row.prompt

    def step(self, action: str) -> Step:
        """Grade the last number of the turn."""
        if exact_match(action, self._expected):
            return Step("That is right.", 1.0, done=True)
        return Step("That is not right. Try again.", 0.0, done=False)


ENVIRONMENTS: Mapping[str, Callable[[], Environment]] = {"reasoning_gym": RetryEnvironment, "service_bot": BookingUser}
"""Kind → factory. A new environment is one more line here, and in `EnvironmentParams.kind`."""


@dataclass(frozen=True)
class EnvironmentReward:
    """Reward component of finished conversations: their known rewards and numbers of turns."""

    rewards: Tensor
    turns: Tensor

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.rewards, {"success": (self.rewards > 0).float(), "turns": self.turns.float()}


@dataclass(frozen=True, kw_only=True)
class MultiTurnRollout(Rollout):
    """A rollout whose responses are whole conversations after their first prompt; `has_eos`: no turn was truncated.

    `texts` holds the policy's own turns, one a line; `transcripts` the environment's as well, with its final turn.
    """

    rewards: Tensor  # [B] of the environment, on the CPU

    @property
    def turns(self) -> Tensor:
        """Number of the policy's turns, [B], on the CPU."""
        return turn_counts(self.response_mask).cpu()

    @property
    def external_rewards(self) -> Mapping[str, Any]:
        return {ENVIRONMENT: EnvironmentReward(self.rewards, self.turns)}


class MultiTurnSampler:
    """Samples conversations of a policy with environments, one environment each; each turn by a `Sampler`."""

    def __init__(self, sampler: Sampler, environment: Callable[[], Environment], *, max_turns: int) -> None:
        self._sampler, self._environment, self._max_turns = sampler, environment, max_turns

    def update_weights(self) -> None:
        """See `Sampler.update_weights`."""
        self._sampler.update_weights()

    def sample(
        self,
        prompts: Sequence[Prompt],
        generator: torch.Generator,
        *,
        samples_per_prompt: int = 1,
        batch_rows: BatchRows | None = None,
    ) -> MultiTurnRollout:
        """Sample conversations, see `Sampler.sample`; row b·samples_per_prompt + g is sample g of prompt b.

        Every turn is sampled from the token ids of the whole conversation so far. Its random numbers follow from the
        generator's seed and the turn, and do not depend on how long other conversations last.
        """
        tokenizer = self._sampler.tokenizer
        episodes = [_Episode(self._environment(), row, tokenizer) for row in prompts for _ in range(samples_per_prompt)]
        rows = batch_rows or BatchRows(range(len(episodes)), len(episodes))
        turns: Rollout | None = None
        for turn in range(self._max_turns):
            active = [position for position, episode in enumerate(episodes) if not episode.done]
            if not active:
                break
            group = 1 if turn else samples_per_prompt
            turns = self._sampler.sample(
                [episodes[position].context for position in active[::group]],
                extend_generator(generator, turn),
                samples_per_prompt=group,
                batch_rows=rows.select(active),
            )
            for row, position in enumerate(active):
                episodes[position].add_policy_turn(turns, row)
                episodes[position].step_environment(last=turn + 1 == self._max_turns)
        assert turns is not None
        return _to_rollout(episodes, tokenizer.pad_token_id, turns)


def with_environment(sampler: Sampler, params: EnvironmentParams | None) -> Sampler | MultiTurnSampler:
    """The sampler itself, or one of conversations with the environment of the `environment` section."""
    if params is None:
        return sampler
    environment = ENVIRONMENTS.get(params.kind) or load_custom("environments", params.kind)
    return MultiTurnSampler(sampler, environment, max_turns=params.max_turns)


class _Episode:
    """State of one conversation; `tokens` follow its prompt."""

    def __init__(self, environment: Environment, row: Prompt, tokenizer: Any) -> None:
        self._environment, self._tokenizer = environment, tokenizer
        self.prompt = environment.reset(row)
        self.prompt_ids: list[int] = encode_prompt(tokenizer, self.prompt)
        self.tokens: list[tuple[Any, ...]] = []  # id, is_policy, log-probability, value, the engine's log-probability
        self.turns: list[str] = []
        self.transcript, self.reward, self.has_eos, self.done = "", 0.0, True, False

    @property
    def context(self) -> list[int]:
        return self.prompt_ids + [token[0] for token in self.tokens]

    def add_policy_turn(self, turns: Rollout, row: int) -> None:
        length = int(turns.response_mask[row].sum())
        columns = (turns.responses, turns.response_mask, turns.logprobs, turns.values, turns.engine_logprobs)
        cut = ([0.0] * length if column is None else column[row, :length].tolist() for column in columns)
        self.tokens += zip(*cut, strict=True)
        self.turns.append(turns.texts[row])
        self.has_eos = self.has_eos and bool(turns.has_eos[row])

    def step_environment(self, *, last: bool) -> None:
        """Step the environment; append its observation as tokens unless the conversation is over."""
        step = self._environment.step(self.turns[-1])
        self.reward, self.done = step.reward, step.done
        if step.done or last:
            self.transcript += self.turns[-1] + final_user_turn(step.observation)
            return
        text = user_turn(step.observation)
        self.transcript += self.turns[-1] + text
        self.tokens += [(token, False, 0.0, 0.0, 0.0) for token in encode_text(self._tokenizer, text)]


def _to_rollout(episodes: Sequence[_Episode], pad_token_id: int, last_turns: Rollout) -> MultiTurnRollout:
    device = last_turns.responses.device

    def padded(column: int) -> Tensor:
        rows = [torch.tensor([token[column] for token in episode.tokens]) for episode in episodes]
        return pad_sequence(rows, batch_first=True, padding_value=0 if column else pad_token_id).to(device)

    responses, response_mask, logprobs, values, engine_logprobs = map(padded, range(5))
    prompt_ids = [episode.prompt_ids for episode in episodes]
    prompts, prompt_mask = (tensor.to(device) for tensor in pad_ids(prompt_ids, pad_token_id, side="left"))
    return MultiTurnRollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        responses=responses,
        response_mask=response_mask,
        logprobs=logprobs,
        has_eos=torch.tensor([episode.has_eos for episode in episodes], device=device),
        prompt_texts=[episode.prompt for episode in episodes],
        texts=["\n".join(turn.strip() for turn in episode.turns) for episode in episodes],
        pad_token_id=pad_token_id,
        values=None if last_turns.values is None else values,
        engine_logprobs=None if last_turns.engine_logprobs is None else engine_logprobs,
        transcripts=[episode.transcript for episode in episodes],
        rewards=torch.tensor([episode.reward for episode in episodes]),
    )
