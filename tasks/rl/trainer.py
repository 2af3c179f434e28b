"""RL trainer of a language model: sample, score, advantages, update, adapt the KL penalty; for PPO and GRPO alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tasks.core import distributed
from tasks.core.errors import TrainingError
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward
from tasks.rl.advantages import (
    apply_missing_eos_penalty,
    discount_by_turns,
    groups_without_signal,
    overlong_ramp,
    turn_counts,
)
from tasks.rl.algorithm import Algorithm, Metrics, ScoredRollout, replace_groups
from tasks.rl.callbacks import Callback, Checkpoint, KLBudget, load_weights
from tasks.rl.hacking import DegenerateResponseMonitor, check_finite, run_detectors
from tasks.rl.kl import kl_estimates, per_sequence
from tasks.rl.masking import masked_mean
from tasks.rl.mismatch import mismatch_metrics
from tasks.rl.multi_turn import MultiTurnSampler
from tasks.rl.policy import Policy
from tasks.rl.rollout import BatchRows, Rollout, Sampler, derive_generator, extend_generator
from tasks.rl.rollout_records import record_groups
from tasks.rl.update import PolicyUpdate

if TYPE_CHECKING:
    from tasks.config.rl import RolloutParams
    from tasks.rl.ptx import Demonstrations

__all__ = ["RLTrainer"]

RECORDED_SAMPLES = 4  # responses of an update that are kept for people to read


class RLTrainer:
    """Trains a policy in place; random choices follow from (seed, update), so a resumed run is the same run."""

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler | MultiTurnSampler,
        prompts: Sequence[Prompt],
        reward: CompositeReward,
        algorithm: Algorithm[Any],
        *,
        seed: int,
        checkpoint: Checkpoint,
        callbacks: Sequence[Callback] = (),
        rollout_params: RolloutParams | None = None,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """Keep the parts; `rollout_params` are needed where an engine samples, `demonstrations` for PPO-ptx."""
        self.policy, self.sampler, self.prompts, self.reward = policy, sampler, prompts, reward
        self.algorithm, self.params, self.seed = algorithm, algorithm.params, seed
        self.checkpoint, self.callbacks, self.rollout_params = checkpoint, callbacks, rollout_params
        self.updater = PolicyUpdate(policy, algorithm, demonstrations)
        self.kl_budget = KLBudget(policy, self.params.kl_budget)
        self.updates_done = 0
        self.history: list[Metrics] = []
        self.samples: list[dict[str, Any]] = []
        self.rollouts: list[dict[str, Any]] = []
        self._last_checkpoint = 0
        self._monitor = DegenerateResponseMonitor(self._warn)

    def train(self) -> None:
        """Run the updates that are left since the last checkpoint, as many as the KL budget allows.

        Raises:
            TrainingError: a number is not finite, or the policy has moved out of reach.
        """
        self._resume()
        while self.updates_done < self.params.updates:
            with self._update_named_in_errors():
                clock = _Stopwatch()
                rollout = self.sample()
                clock.lap("rollout_s")
                scored, sampling = self.resample(self.score(rollout))
                kl = scored.sequence_kl.mean().item()
                if self.kl_budget.exceeded(kl):
                    break
                experience, metrics = self.algorithm.compute_advantages(scored)
                kl_coef, update = self.algorithm.kl_controller.kl_coef, self.updates_done + 1
                self.rollouts += record_groups(
                    scored, experience, self.params, update=update, kl_coef=kl_coef, recorded=self.rollouts
                )
                clock.lap("experience_s")
                metrics = self._rollout_metrics(scored) | sampling | metrics
                self.kl_budget.keep_weights()
                metrics |= self.updater(experience, self.updates_done, self._generator("permutation"))
                clock.lap("optimise_s")
                self.algorithm.kl_controller.update(kl, len(experience))
            self._end_update(metrics, clock.metrics(rollout))
        else:
            kl = self._final_kl()
        if self.kl_budget.exceeded(kl):
            self._return_to_budget(kl)
        distributed.check_in_sync(self.policy.trainable_parameters().values())
        for callback in self.callbacks:
            callback.on_train_end()

    def sample(self) -> Rollout:
        """Sample responses to this rank's shard of the update's prompts; row b·G + g answers prompt b."""
        self.sampler.update_weights()
        return self._sample(list(enumerate(self._prompt_indices())), self._generator("rollout"))

    def _sample(self, places: list[tuple[int, int]], generator: torch.Generator) -> Rollout:
        """Sample responses to this rank's shard of (place in the batch, index of the prompt there)."""
        group = self.params.samples_per_prompt
        shard = distributed.shard(places, f"{self.params.stage}.prompts_per_update")
        rows = [place * group + sample for place, _ in shard for sample in range(group)]
        return self.sampler.sample(
            [self.prompts[index] for _, index in shard],
            generator,
            samples_per_prompt=group,
            batch_rows=BatchRows(rows, self.params.prompts_per_update * group),
        )

    def resample(self, scored: ScoredRollout) -> tuple[ScoredRollout, Metrics]:
        """Dynamic sampling: other prompts in place of those whose scores are all equal, in a bounded number of rounds.

        The prompts come from a permutation of those that the update has not drawn, which follows from (seed, update).
        """
        group = self.params.samples_per_prompt
        if group < 2:
            return scored, {}
        places, drawn = groups_without_signal(scored.scores, group), set(self._prompt_indices())
        metrics: Metrics = {"no_signal_share": len(places) / self.params.prompts_per_update}
        order = torch.randperm(len(self.prompts), generator=self._generator("other prompts")).tolist()
        others = [index for index in order if index not in drawn]
        used = 0
        for number in range(self.params.resample_rounds):
            fresh = list(zip(places, others[used:], strict=False))
            if not fresh:
                break
            used += len(fresh)
            padded = fresh + fresh[-1:] * (-len(fresh) % distributed.world_size())
            extra = self.score(self._sample(padded, extend_generator(self._generator("other responses"), number)))
            empty = set(groups_without_signal(extra.scores, group))
            found = [position for position in range(len(fresh)) if position not in empty]
            scored = replace_groups(scored, extra, group, dict(zip(places, found, strict=False)))
            places = places[len(found) :]
        if self.params.resample_rounds:
            metrics |= {"no_signal_share_left": len(places) / self.params.prompts_per_update, "resampled_prompts": used}
        return scored, metrics

    def score(self, rollout: Rollout) -> ScoredRollout:
        """Score this rank's responses, with their log-probabilities under the reference; gather those of all."""
        prompts, texts = rollout.prompt_texts, rollout.texts
        check_finite("log-probability of the policy", rollout.logprobs, prompts, texts)
        reference_logprobs = self.policy.reference_logprobs(rollout)
        check_finite("log-probability of the reference", reference_logprobs, prompts, texts)
        focused = self.params.top_entropy_share < 1
        entropies = distributed.all_gather(self.policy.entropies(rollout)) if focused else None
        reward = self.reward(prompts, texts, self.updates_done + 1, rollout.external_rewards).gather()
        rollout = rollout.gather()
        total, turns = reward.total.to(rollout.logprobs.device), turn_counts(rollout.response_mask)
        discounted = discount_by_turns(total, turns, self.algorithm.return_gamma)
        lengths, params = rollout.response_mask.sum(1), self.params
        ramp = overlong_ramp(lengths, longest=self.algorithm.max_new_tokens, buffer=params.overlong_buffer)
        return ScoredRollout(
            rollout=rollout,
            reference_logprobs=distributed.all_gather(reference_logprobs),
            reward=reward,
            scores=apply_missing_eos_penalty(discounted, rollout.has_eos, params.missing_eos_penalty, ramp),
            rollout_params=self.rollout_params,
            entropies=entropies,
        )

    def _prompt_indices(self) -> list[int]:
        """Indices of this update's prompts: a new permutation for every pass over the data."""
        total, size = len(self.prompts), self.params.prompts_per_update
        positions = range(self.updates_done * size, (self.updates_done + 1) * size)
        passes = {p // total for p in positions}
        orders = {i: torch.randperm(total, generator=derive_generator(self.seed, i)) for i in passes}
        return [int(orders[p // total][p % total]) for p in positions]

    def _generator(self, purpose: str) -> torch.Generator:
        return derive_generator(self.seed, self.updates_done, sum(purpose.encode()))

    def _final_kl(self) -> float:
        """KL of the policy after the last update, measured only where there is a budget."""
        if not self.kl_budget.is_limited:
            return 0.0
        rollout = self.sample()
        mask = rollout.response_mask
        kl = kl_estimates(rollout.logprobs, self.policy.reference_logprobs(rollout), mask)
        return distributed.all_gather(per_sequence(kl.k1, mask)).mean().item()

    def _return_to_budget(self, kl: float) -> None:
        """Restore the weights before the last update; TrainingError where there was none."""
        limit = f"{self.params.stage}.kl_budget {self.kl_budget.limit:g}"
        if not self.updates_done:
            raise TrainingError(f"update 1: the KL is {kl:.3g} before any update, over {limit}; raise it")
        load_weights(self.policy, self.kl_budget.weights)
        self._warn(
            f"the KL after update {self.updates_done} is {kl:.3g} nats per response, over {limit}: training "
            f"ends with the policy before it, whose KL was {self.history[-1]['kl']:.3g}"
        )

    def _rollout_metrics(self, scored: ScoredRollout) -> Metrics:
        """Metrics of the responses; a few of them are recorded as samples."""
        reward, kl, rollout, mask = scored.reward, scored.kl, scored.rollout, scored.rollout.response_mask
        self._record_samples(scored)
        mismatch: Metrics = {}
        if rollout.engine_logprobs is not None and self.rollout_params:
            mismatch = mismatch_metrics(rollout.logprobs, rollout.engine_logprobs, mask, self.rollout_params)
        return {
            "reward": reward.total.mean().item(),
            **{f"reward/{name}": values.mean().item() for name, values in reward.components.items()},
            **{name: values.mean().item() for name, values in reward.metrics.items()},
            "score": scored.scores.mean().item(),
            "score_std": scored.scores.std().item(),
            "kl": scored.sequence_kl.mean().item(),
            "kl_k2": per_sequence(kl.k2, mask).mean().item(),
            "kl_k3": per_sequence(kl.k3, mask).mean().item(),
            "kl_per_token": masked_mean(kl.k1, mask).item(),
            "kl_coef": self.algorithm.kl_controller.kl_coef,
            "length": mask.sum(1).float().mean().item(),
            **mismatch,
            **self._monitor(rollout.texts, rollout.has_eos, self.updates_done + 1),
        }

    def _record_samples(self, scored: ScoredRollout) -> None:
        rollout, count = scored.rollout, len(scored.scores)
        rows = [
            {
                "step": self.updates_done + 1,
                "prompt": rollout.prompt_texts[i],
                "response": rollout.transcripts[i],
                "score": scored.scores[i].item(),
                **{name: values[i].item() for name, values in scored.reward.components.items()},
                "kl": scored.sequence_kl[i].item(),
            }
            for i in range(0, count, max(1, count // RECORDED_SAMPLES))
        ][:RECORDED_SAMPLES]
        self.samples += rows
        for callback in self.callbacks:
            callback.on_samples(rows, self.updates_done + 1)

    def _end_update(self, metrics: Metrics, timings: Metrics) -> None:
        """Add the update to the history, run the detectors on it, and save a checkpoint if it is due."""
        self.updates_done += 1
        row: Metrics = {"step": self.updates_done, **metrics}
        self.history.append(row)
        signals, fired = run_detectors(self.history, self.reward.marginal_weights(self.updates_done))
        row |= signals
        for detector, value in fired:
            self._warn(f"warning: update {self.updates_done}: {detector.message(value)}")
        for callback in self.callbacks:
            callback.on_update_end(self.updates_done)
            callback.on_log(row | timings, self.updates_done)
        if self.updates_done % self.params.checkpoint_every == 0 and self.updates_done < self.params.updates:
            self.checkpoint.save(self._state())
            self._last_checkpoint = self.updates_done

    def _warn(self, message: str) -> None:
        for callback in self.callbacks:
            callback.on_warning(message)

    @contextmanager
    def _update_named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except TrainingError as error:
            kept = f"; the checkpoint of update {self._last_checkpoint} is kept" if self._last_checkpoint else ""
            raise TrainingError(f"update {self.updates_done + 1}: {error}{kept}") from error

    def _state(self) -> dict[str, Any]:
        return {
            "update": self.updates_done,
            "weights": {name: value.detach() for name, value in self.policy.trainable_parameters().items()},
            "optimizer": self.updater.optimizer.state_dict(),
            "kl_coef": self.algorithm.kl_controller.kl_coef,
            "history": self.history,
            "samples": self.samples,
            "rollouts": self.rollouts,
            "budget_weights": self.kl_budget.weights,
        }

    def _resume(self) -> None:
        """Load the checkpoint, if there is one, and log its curves and samples again."""
        if not (state := self.checkpoint.load(self._warn)):
            return
        load_weights(self.policy, state["weights"])
        self.updater.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.kl_controller.kl_coef = state["kl_coef"]
        self.kl_budget.weights = state["budget_weights"]
        self.updates_done = self._last_checkpoint = state["update"]
        self.history, self.samples, self.rollouts = state["history"], state["samples"], state["rollouts"]
        for callback in self.callbacks:
            for row in self.history:
                callback.on_log(row, int(row["step"]))
            callback.on_samples(self.samples, self.updates_done)
        place = f"update {self.updates_done} of {self.params.updates}"
        self._warn(f"goes on from {place} (checkpoint of an interrupted run)")


class _Stopwatch:
    """Seconds of the phases of an update."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._laps[phase], self._last = now - self._last, now

    def metrics(self, rollout: Rollout) -> Metrics:
        tokens = float(distributed.all_gather(rollout.response_mask.sum(1)).sum())  # of all ranks
        tokens_per_s = tokens / self._laps["rollout_s"]
        timings = {**self._laps, "rollout_tokens_per_s": tokens_per_s, "update_s": time.perf_counter() - self._started}
        return {f"time/{name}": value for name, value in timings.items()}
