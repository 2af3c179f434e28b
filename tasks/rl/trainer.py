"""Proximal policy optimisation of a language model: rollout, reward, advantages, update, control.

Generation is a Markov decision process: the state is the prompt with the tokens so far, the action is the next token,
the score arrives with the last token, and γ = 1 spreads it over the response. With an environment the policy's turns
are parts of one episode (see conversation.py). What each line follows, with sources, is in README.md beside this file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.core import distributed
from tasks.core.errors import TrainingError
from tasks.rewards.composition import CompositeReward, RewardBatch
from tasks.rl.advantages import (
    action_mask,
    action_values,
    apply_missing_eos_penalty,
    discount_by_turns,
    gae,
    leave_one_out,
    to_actions,
    token_rewards,
    turn_counts,
)
from tasks.rl.hacking import DegenerateResponseMonitor, check_finite, run_detectors
from tasks.rl.kl import AdaptiveKL, FixedKL, KLController, kl_estimates, per_sequence
from tasks.rl.masking import explained_variance, masked_mean, whiten, zero_masked
from tasks.rl.multi_turn import MultiTurnSampler
from tasks.rl.policy import Experience, Policy
from tasks.rl.rollout import Rollout, derive_generator, generate
from tasks.rl.updater import Metrics, PPOUpdate

if TYPE_CHECKING:
    from tasks.config.training import GenerationParams, PPOParams

__all__ = ["PPOTrainer", "PromptSet"]

Log = Callable[[Metrics, int], None]
LogSamples = Callable[[list[dict[str, Any]], int], None]


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts and the decoder."""

    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    eos_token_id: int
    pad_token_id: int


class PPOTrainer:
    """Trains a policy in place; random choices follow from (seed, update), so a resumed run is the same run."""

    def __init__(
        self,
        policy: Policy,
        prompt_set: PromptSet,
        reward: CompositeReward,
        params: PPOParams,
        generation: GenerationParams,
        *,
        seed: int,
        multi_turn: MultiTurnSampler | None = None,
        checkpoints: Path | None = None,
        log: Log = lambda metrics, step: None,
        log_samples: LogSamples = lambda rows, step: None,
        warn: Callable[[str], None] = lambda message: None,
        save_snapshot: Callable[[int], None] = lambda update: None,
    ) -> None:
        self.policy, self.prompt_set, self.reward = policy, prompt_set, reward
        self.params, self.generation, self.seed, self._multi_turn = params, generation, seed, multi_turn
        self._checkpoint = None if checkpoints is None else checkpoints / "ppo.pt"
        self._log, self._log_samples, self._warn, self._save_snapshot = log, log_samples, warn, save_snapshot
        self.updater = PPOUpdate(policy, params, prompt_set.decode)
        self.controller: KLController = (
            FixedKL(params.kl_coef)
            if params.kl_controller == "fixed"
            else AdaptiveKL(params.kl_coef, target=params.adaptive_kl_target, horizon=params.kl_horizon)
        )
        self.update = 0
        self.history: list[Metrics] = []
        self.samples: list[dict[str, Any]] = []
        self._last_checkpoint = 0
        self._previous_weights: dict[str, Tensor] = {}
        self._response_monitor = DegenerateResponseMonitor(warn)

    def train(self) -> None:
        """Run the updates that are left since the last checkpoint, as many as the KL budget allows.

        The checkpoint is removed at the end, and kept where training fails.

        Raises:
            TrainingError: a reward, log-probability, loss or gradient is not finite, or the policy has moved out of
                reach; it names the update, the quantity and the samples.
        """
        self._resume()
        while self.update < self.params.updates:
            started = time.perf_counter()
            try:
                metrics = self._update_step()
            except TrainingError as error:
                kept = f"; the checkpoint of update {self._last_checkpoint} is kept" if self._last_checkpoint else ""
                raise TrainingError(f"update {self.update + 1}: {error}{kept}") from error
            if metrics is None:
                break
            self.update += 1
            row: Metrics = {"step": self.update, **metrics}
            self.history.append(row)
            row |= self._run_detectors()
            self._save_snapshot(self.update)
            seconds = time.perf_counter() - started
            self._log({**row, "time/update_s": seconds}, self.update)
            if self.update % self.params.checkpoint_every == 0 and self.update < self.params.updates:
                self._save()
        else:
            self._check_final_kl()
        distributed.check_in_sync(self.policy.trainable_parameters().values())
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)

    def _run_detectors(self) -> Metrics:
        signals, found = run_detectors(self.history, self.reward.marginal_weights(self.update))
        for detector, value in found:
            self._warn(f"warning: update {self.update}: {detector.message(value)}")
        return signals

    # -- one update ---------------------------------------------------------------------------------------------

    def _update_step(self) -> Metrics | None:
        """Roll out, score, and update; None, with the previous weights restored, where the KL is over its budget."""
        clock = time.perf_counter()
        rollout, prompts = self._rollout()
        rollout_s, clock = time.perf_counter() - clock, time.perf_counter()
        experience, metrics = self._build_experience(*self._score_rollout(rollout, prompts))
        experience_s, clock = time.perf_counter() - clock, time.perf_counter()
        if self._revert_if_over_budget(metrics["kl"]):
            return None
        if self.params.kl_budget is not None:
            self._previous_weights = {
                name: value.detach().clone() for name, value in self.policy.trainable_parameters().items()
            }
        learning_rate = self.params.learning_rate * (1 - self.update / self.params.updates)
        metrics |= self.updater(experience, learning_rate, self._generator("permutation"))
        update_s = time.perf_counter() - clock
        tokens = float(rollout.response_mask.sum())
        timings = {"rollout_s": rollout_s, "experience_s": experience_s, "optimise_s": update_s}
        timings["rollout_tokens_per_s"] = tokens / rollout_s
        self._log({f"time/{name}": value for name, value in timings.items()}, self.update + 1)
        self.controller.update(metrics["kl"], len(experience))
        return metrics

    def _rollout(self) -> tuple[Rollout, list[str]]:
        """Sample responses to this rank's shard of the update's prompts; row b·G + g answers prompt b."""
        indices = distributed.shard(self._prompt_indices(), "ppo.prompts_per_update")
        if self._multi_turn is not None:
            conversations = self._multi_turn(
                self.policy.model,
                indices,
                self.params.samples_per_prompt,
                lambda turn: self._generator("rollout", turn),
                value_head=self.policy.value_head,
            )
            return conversations, conversations.prompt_texts
        rollout = generate(
            self.policy.model,
            [self.prompt_set.prompt_ids[index] for index in indices],
            max_new_tokens=self.generation.max_new_tokens,
            temperature=self.generation.temperature,
            eos_token_id=self.prompt_set.eos_token_id,
            pad_token_id=self.prompt_set.pad_token_id,
            generator=self._generator("rollout"),
            samples_per_prompt=self.params.samples_per_prompt,
            value_head=self.policy.value_head,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        return rollout, [self.prompt_set.prompts[i] for i in indices for _ in range(self.params.samples_per_prompt)]

    def _prompt_indices(self) -> list[int]:
        """Indices of this update's prompts: a new permutation for every pass over the data."""
        total, size = len(self.prompt_set.prompts), self.params.prompts_per_update
        positions = range(self.update * size, (self.update + 1) * size)
        orders = {
            p // total: torch.randperm(total, generator=derive_generator(self.seed, p // total)) for p in positions
        }
        return [int(orders[p // total][p % total]) for p in positions]

    def _score_rollout(
        self, rollout: Rollout, prompts: list[str]
    ) -> tuple[Rollout, list[str], list[str], Tensor, RewardBatch]:
        """Decode, score and compute reference log-probabilities of this rank's responses; gather those of all ranks."""
        responses = rollout.texts(self.prompt_set.decode)
        check_finite("log-probability of the policy", rollout.logprobs, prompts, responses)
        reference_logprobs = self.policy.reference_logprobs(rollout)
        check_finite("log-probability of the reference", reference_logprobs, prompts, responses)
        reward = self.reward(prompts, responses, self.update + 1, rollout.external_rewards)
        gathered = rollout.gather(self.prompt_set.pad_token_id)
        texts = distributed.all_gather_texts(prompts), distributed.all_gather_texts(responses)
        return gathered, *texts, distributed.all_gather(reference_logprobs), reward.gather()

    def _build_experience(
        self,
        rollout: Rollout,
        prompts: list[str],
        responses: list[str],
        reference_logprobs: Tensor,
        outcome: RewardBatch,
    ) -> tuple[Experience, Metrics]:
        """Compute token rewards with the KL penalty, advantages, and the metrics of the update."""
        mask = rollout.response_mask
        total = outcome.total.to(mask.device)
        # Over turns as actions the returns discount.
        discounted_rewards = (
            total if self.params.action == "turn" else discount_by_turns(total, turn_counts(mask), self._turn_gamma)
        )
        scores = apply_missing_eos_penalty(discounted_rewards, rollout.has_eos, self.params.missing_eos_penalty)
        kl = kl_estimates(rollout.logprobs, reference_logprobs, mask)
        rewards = token_rewards(scores, kl.k1, mask, kl_coef=self.controller.kl_coef)
        experience = self._compute_advantages(rollout, rewards)
        k1 = per_sequence(kl.k1, mask)
        self._record_samples(prompts, rollout.display_texts(responses), outcome.components, scores, k1)
        metrics = {
            "reward": total.mean().item(),
            **{f"reward/{name}": values.mean().item() for name, values in outcome.components.items()},
            **{name: values.mean().item() for name, values in outcome.metrics.items()},
            "score": scores.mean().item(),
            "score_std": scores.std().item(),
            "non_score_reward": -self.controller.kl_coef * k1.mean().item(),
            "total_reward": rewards.sum(1).mean().item(),
            "kl": k1.mean().item(),
            "kl_k2": per_sequence(kl.k2, mask).mean().item(),
            "kl_k3": per_sequence(kl.k3, mask).mean().item(),
            "kl_per_token": masked_mean(kl.k1, mask).item(),
            "kl_coef": self.controller.kl_coef,
            "length": mask.sum(1).float().mean().item(),
            **self._response_monitor(responses, rollout.has_eos, self.update + 1),
            "explained_variance": explained_variance(
                experience.old_values, experience.returns, experience.action_mask
            ).item(),
        }
        return experience, metrics

    def _compute_advantages(self, rollout: Rollout, per_token_rewards: Tensor) -> Experience:
        """Compute advantages and returns per action."""
        params, mask = self.params, rollout.response_mask
        rewards, valid = to_actions(per_token_rewards, mask, params.action), action_mask(mask, params.action)
        values = action_values(rollout.values, mask, params.action)
        if params.advantage == "gae":
            gamma = self._turn_gamma if params.action == "turn" else params.gamma
            advantages, returns = gae(rewards, values, valid, gamma=gamma, lam=params.lam)
        else:
            sequence_rewards = per_token_rewards.sum(1)
            returns = zero_masked(sequence_rewards.unsqueeze(1).expand(valid.shape), valid)
            sequence_advantages = leave_one_out(sequence_rewards, params.samples_per_prompt)
            advantages = zero_masked(sequence_advantages.unsqueeze(1).expand(valid.shape), valid)
        return Experience(
            prompts=rollout.prompts,
            prompt_mask=rollout.prompt_mask,
            responses=rollout.responses,
            response_mask=mask,
            action_mask=valid,
            old_logprobs=to_actions(rollout.logprobs, mask, params.action),
            old_values=values,
            advantages=whiten(advantages, valid),
            returns=returns,
        )

    def _check_final_kl(self) -> None:
        """Check the policy of the last update against the KL budget, if there is one."""
        if self.params.kl_budget is None:
            return
        rollout, _ = self._rollout()
        mask = rollout.response_mask
        kl = kl_estimates(rollout.logprobs, self.policy.reference_logprobs(rollout), mask)
        self._revert_if_over_budget(distributed.all_gather(per_sequence(kl.k1, mask)).mean().item())

    def _revert_if_over_budget(self, kl: float) -> bool:
        """Restore the previous weights if the KL is over its budget; return whether it was."""
        budget = self.params.kl_budget
        if budget is None or kl <= budget:
            return False
        if not self._previous_weights:
            raise TrainingError(f"the KL is {kl:.3g} before any update, over ppo.kl_budget {budget:g}; raise it")
        weights = self.policy.trainable_parameters()
        for name, value in self._previous_weights.items():
            weights[name].data.copy_(value)
        self._warn(
            f"the KL after update {self.update} is {kl:.3g} nats per response, over ppo.kl_budget {budget:g}: training "
            f"ends with the policy before it, whose KL was {self.history[-1]['kl']:.3g}"
        )
        return True

    # -- state -------------------------------------------------------------------------------------------------

    @property
    def _turn_gamma(self) -> float:
        return 1.0 if self._multi_turn is None else self._multi_turn.gamma

    def _generator(self, purpose: str, *more: int) -> torch.Generator:
        return derive_generator(self.seed, self.update, sum(purpose.encode()), *more)

    def _record_samples(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        components: Mapping[str, Tensor],
        scores: Tensor,
        kl: Tensor,
        count: int = 4,
    ) -> None:
        """Record a few responses of the update, for people to read."""
        rows = [
            {
                "step": self.update + 1,
                "prompt": prompts[i],
                "response": responses[i],
                "score": scores[i].item(),
                **{name: values[i].item() for name, values in components.items()},
                "kl": kl[i].item(),
            }
            for i in range(0, len(prompts), max(1, len(prompts) // count))
        ][:count]
        self.samples += rows
        self._log_samples(rows, self.update + 1)

    def _save(self) -> None:
        """Write the checkpoint atomically, on rank 0; all ranks read it when they resume."""
        if self._checkpoint is None or distributed.rank() > 0:
            return
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "update": self.update,
            "weights": {name: value.detach() for name, value in self.policy.trainable_parameters().items()},
            "optimizer": self.updater.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
            "history": self.history,
            "samples": self.samples,
            "before": self._previous_weights,
        }
        temporary = self._checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._checkpoint)
        self._last_checkpoint = self.update

    def _resume(self) -> None:
        if self._checkpoint is None or not self._checkpoint.is_file():
            return
        state = torch.load(self._checkpoint, weights_only=True)
        weights = self.policy.trainable_parameters()
        for name, value in state["weights"].items():
            weights[name].data.copy_(value)
        self.updater.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])
        self.update, self.history, self.samples = state["update"], state["history"], state["samples"]
        self._last_checkpoint, self._previous_weights = state["update"], state["before"]
        for row in self.history:  # a resumed run has complete curves
            self._log(row, int(row["step"]))
        self._log_samples(self.samples, self.update)
        self._warn(f"goes on from update {self.update} of {self.params.updates} (checkpoint of an interrupted run)")
