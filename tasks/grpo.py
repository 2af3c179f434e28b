"""Stage grpo: GRPO by TRL with the same composed reward and rollouts as PPO."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from tasks.config.base import ENVIRONMENT
from tasks.core import distributed, tracking
from tasks.core.errors import TrainingError
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, read_rows, write_json, write_rows
from tasks.models.hf_training import HistoryCallback, PolicySnapshots, train_or_resume, trainer_arguments, write_history
from tasks.models.loading import init_process, load_reference, load_tokenizer, lora_config, save_adapter
from tasks.rewards.composition import CompositeReward, load_reward
from tasks.rl.advantages import apply_missing_eos_penalty, discount_by_turns
from tasks.rl.hacking import DegenerateResponseMonitor, run_detectors
from tasks.rl.masking import through_last_true
from tasks.rl.multi_turn import EnvironmentReward, MultiTurnRollout, MultiTurnSampler, load_multi_turn_sampler
from tasks.rl.rollout import derive_generator, generate

if TYPE_CHECKING:
    from tasks.config.reward import RewardParams
    from tasks.config.training import EnvironmentParams, GenerationParams, GRPOParams, LoraParams

__all__ = ["ConversationSummary", "MultiTurnRolloutFunction", "RolloutFunction", "grpo"]

CHECKPOINT_UPDATES = 4
"""Updates between checkpoints: each has at least a rollout's work in it, so they cost little."""

SAMPLE_COLUMNS = ("step", "prompt", "response", "score")
"""The order of a sample's keys; a checkpoint sorts them."""

TRL_METRICS = {
    "loss": "loss",
    "entropy": "entropy",
    "clip_fraction": "clip_ratio/region_mean",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


def grpo(
    params: GRPOParams,
    lora: LoraParams,
    generation: GenerationParams,
    reward: RewardParams,
    environment: EnvironmentParams | None,
    policy_seed: int,
    artifacts: Artifacts,
) -> None:
    """Train the policy with TRL's GRPOTrainer: advantages are rewards standardised within each prompt's group.

    With an environment a sample is a whole conversation, see `MultiTurnRolloutFunction`.

    Writes adapter/, policies/ (the adapter of every `snapshot_every` updates), history.csv (one row per update),
    samples.jsonl and metrics.json (the last update's figures).
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    prompts = read_rows(artifacts.prepare / "prompts" / "train.jsonl", Prompt)
    composed = load_reward(reward, prompts, artifacts)
    score = _RewardFunction(composed, params, tokenizer.eos_token_id, environment.gamma if environment else 1.0)
    rollouts: RolloutFunction | MultiTurnRolloutFunction = RolloutFunction(params, generation, tokenizer, policy_seed)
    if environment:
        conversations = load_multi_turn_sampler(environment, prompts, tokenizer, generation)
        rollouts = MultiTurnRolloutFunction(params, conversations, [row.prompt for row in prompts], policy_seed)
    history = HistoryCallback("grpo")
    snapshots = PolicySnapshots(params.snapshot_every, artifacts.out)
    torch.manual_seed(policy_seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        trainer = GRPOTrainer(
            model=load_reference(artifacts.base_model, artifacts.sft),
            peft_config=lora_config(lora, TaskType.CAUSAL_LM),
            reward_funcs=[score],
            args=_arguments(params, generation, policy_seed),
            train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in prompts]),
            processing_class=tokenizer,
            callbacks=[history, _UpdateCallback(params, history, snapshots, composed.marginal_weights)],
            rollout_func=rollouts,
        )
    train_or_resume(trainer)
    save_adapter(trainer.model, artifacts.out)
    snapshots.publish()
    logged = _logged_rollouts(trainer.state)
    rows = _update_rows(history.rows, logged, params.epochs * params.minibatches, composed.marginal_weights)
    write_history(artifacts.out / "history.csv", rows)
    samples = [sample for entry in logged for sample in entry["samples"]]
    write_rows(artifacts.out / "samples.jsonl", ({name: sample[name] for name in SAMPLE_COLUMNS} for sample in samples))
    write_json(artifacts.out / "metrics.json", rows[-1])


def _arguments(params: GRPOParams, generation: GenerationParams, seed: int) -> GRPOConfig:
    distributed.per_rank(params.prompts_per_update, "grpo.prompts_per_update")
    whole = params.prompts_per_update * params.samples_per_prompt // params.minibatches
    batch = distributed.per_rank(whole, "the size of grpo's minibatches")
    arguments = trainer_arguments(seed=seed, batch_size=batch, learning_rate=params.learning_rate, epochs=1)
    steps_per_update = params.epochs * params.minibatches
    # No checkpoint holds the responses that an update still has to learn from: checkpoints only between updates.
    steps = {"logging_steps": 1, "save_steps": CHECKPOINT_UPDATES * steps_per_update}
    return GRPOConfig(
        **(arguments | steps | {"accelerator_config": None}),  # TRL shares batches out by itself
        max_steps=params.updates * steps_per_update,
        steps_per_generation=params.minibatches,
        num_generations=params.samples_per_prompt,
        num_iterations=params.epochs,
        max_completion_length=generation.max_new_tokens,
        temperature=generation.temperature,
        beta=params.kl_coef,
        epsilon=params.clip_range,
        loss_type="grpo",
        scale_rewards="group",
    )


WeightsAt = Callable[[int], Mapping[str, float]]
"""Update → component → marginal weight in the reward."""


class RolloutFunction:
    """TRL's `rollout_func`: our decode loop, each prompt computed once for its whole group."""

    def __init__(self, params: GRPOParams, generation: GenerationParams, tokenizer: Any, seed: int) -> None:
        self._params, self._generation, self._tokenizer, self._seed = params, generation, tokenizer, seed

    def __call__(self, prompts: Sequence[str], trainer: GRPOTrainer) -> dict[str, Any]:
        group = self._params.samples_per_prompt
        distinct = [self._tokenizer(prompt).input_ids for prompt in prompts[::group]]
        trainer.model.eval()
        rollout = generate(
            trainer.model,
            distinct,
            max_new_tokens=self._generation.max_new_tokens,
            temperature=self._generation.temperature,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            generator=torch.Generator().manual_seed(self._seed * 1_000_003 + trainer.state.global_step),
            samples_per_prompt=group,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        trainer.model.train()
        lengths = rollout.response_mask.sum(1).tolist()
        return {
            "prompt_ids": [ids for ids in distinct for _ in range(group)],
            "completion_ids": [row[:n].tolist() for row, n in zip(rollout.responses, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(rollout.logprobs, lengths, strict=True)],
        }


@dataclass(frozen=True)
class ConversationSummary:
    """What `_RewardFunction` has to know of a conversation; TRL hands it on as it is."""

    policy_text: str
    transcript: str
    reward: float
    turns: int
    tokens: int
    ended: bool


class MultiTurnRolloutFunction:
    """TRL's `rollout_func` for conversations; `env_mask` takes the environment's tokens out of loss, KL and entropy.

    TRL's alternative, `environment_factory`, does not fit: there an environment's methods are tools, a turn goes to it
    only where the model has written a tool call, and the tokenizer's chat template must know tools, which that of our
    base model does not. Here every turn of the policy is an action, in plain text.
    """

    def __init__(self, params: GRPOParams, conversations: MultiTurnSampler, prompts: Sequence[str], seed: int) -> None:
        self._group, self._sample_conversations, self._seed = params.samples_per_prompt, conversations, seed
        self._prompt_indices = {prompt: index for index, prompt in enumerate(prompts)}

    def __call__(self, prompts: Sequence[str], trainer: GRPOTrainer) -> dict[str, Any]:
        trainer.model.eval()
        step = trainer.state.global_step
        conversations = self._sample_conversations(
            trainer.model,
            [self._prompt_indices[prompt] for prompt in prompts[:: self._group]],
            self._group,
            lambda turn: derive_generator(self._seed, step, turn),
        )
        trainer.model.train()
        lengths = through_last_true(conversations.response_mask).sum(1).tolist()
        prompt_lengths = conversations.prompt_mask.sum(1).tolist()

        def rows(tensor: Tensor) -> list[Any]:
            return [row[:n].tolist() for row, n in zip(tensor, lengths, strict=True)]

        return {
            "prompt_ids": [row[-n:].tolist() for row, n in zip(conversations.prompts, prompt_lengths, strict=True)],
            "completion_ids": rows(conversations.responses),
            "logprobs": rows(conversations.logprobs),
            "env_mask": rows(conversations.response_mask.long()),
            "summaries": _summaries(conversations),
        }


def _summaries(conversations: MultiTurnRollout) -> list[ConversationSummary]:
    columns = zip(
        conversations.policy_texts,
        conversations.transcripts,
        conversations.rewards.tolist(),
        conversations.turns.tolist(),
        conversations.response_mask.sum(1).tolist(),
        conversations.has_eos.tolist(),
        strict=True,
    )
    return [ConversationSummary(*values) for values in columns]


class _RewardFunction:
    """TRL's reward function: the composed reward; logs every component and some samples.

    They are kept in the trainer's log, which is part of its checkpoints.
    """

    __name__ = "reward"

    def __init__(self, reward: CompositeReward, params: GRPOParams, eos_token_id: int, turn_gamma: float = 1.0) -> None:
        self._reward, self._penalty, self._eos = reward, params.missing_eos_penalty, eos_token_id
        self._turn_gamma = turn_gamma
        self._group = params.samples_per_prompt
        self._steps_per_update = params.epochs * params.minibatches
        self._monitor = DegenerateResponseMonitor(lambda message: tqdm.write(f"grpo: {message}", file=sys.stderr))

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        trainer_state: Any,
        summaries: list[ConversationSummary] | None = None,
        **_: Any,
    ) -> list[float]:
        step = trainer_state.global_step // self._steps_per_update + 1
        summaries = summaries or [
            ConversationSummary(text, text, 0.0, 1, len(ids), ids[-1] == self._eos)
            for text, ids in zip(completions, completion_ids, strict=True)
        ]
        completions, turns = [item.policy_text for item in summaries], torch.tensor([item.turns for item in summaries])
        environment_reward = EnvironmentReward(torch.tensor([item.reward for item in summaries]), turns)
        try:
            outcome = self._reward(prompts, completions, step, {ENVIRONMENT: environment_reward})
        except TrainingError as error:
            raise TrainingError(f"update {step}: {error}") from error
        ended = torch.tensor([item.ended for item in summaries])
        scores = apply_missing_eos_penalty(
            discount_by_turns(outcome.total, turns, self._turn_gamma), ended, self._penalty
        )
        gathered = outcome.gather()
        lengths = distributed.all_gather(torch.tensor([item.tokens for item in summaries]))
        all_scores = distributed.all_gather(scores)
        prompts, completions = distributed.all_gather_texts(prompts), distributed.all_gather_texts(completions)
        transcripts = distributed.all_gather_texts([item.transcript for item in summaries])
        means = {
            "reward": gathered.total.mean().item(),
            **{f"reward/{name}": values.mean().item() for name, values in gathered.components.items()},
            **{name: values.mean().item() for name, values in gathered.metrics.items()},
            "score_std": all_scores.std().item(),
            "length": lengths.sum().item() / len(lengths),
            **self._monitor(completions, distributed.all_gather(ended), step),
        }
        tracking.log_metrics(means, step=trainer_state.global_step + 1)
        rows = [
            {"step": step, "prompt": prompts[i], "response": transcripts[i], "score": all_scores[i].item()}
            for i in range(0, len(prompts), self._group)
        ][:4]
        trainer_state.log_history.append({**means, "samples": rows, "step": trainer_state.global_step + 1})
        tracking.log_samples("samples", rows, step=step)
        return [float(value) for value in scores]


class _UpdateCallback(TrainerCallback):
    """Saves policy snapshots and runs the reward-hacking detectors after each update."""

    def __init__(
        self, params: GRPOParams, history: HistoryCallback, snapshots: PolicySnapshots, weights_at: WeightsAt
    ) -> None:
        self._history, self._snapshots, self._weights_at = history, snapshots, weights_at
        self._steps = params.epochs * params.minibatches

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self._steps == 0:
            self._snapshots.save(state.global_step // self._steps, model)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if len(self._history.rows) < state.global_step or state.global_step % self._steps:
            return
        rows = _update_rows(self._history.rows, _logged_rollouts(state), self._steps, self._weights_at)
        signals, fired = run_detectors(rows, self._weights_at(len(rows)))
        tracking.log_metrics(signals, step=state.global_step)
        for detector, value in fired if distributed.rank() == 0 else []:
            tqdm.write(f"grpo: warning: update {len(rows)}: {detector.message(value)}", file=sys.stderr)


def _logged_rollouts(state: TrainerState) -> list[dict[str, Any]]:
    """What `_RewardFunction` has kept in the trainer's log."""
    return [entry for entry in state.log_history if "samples" in entry]


def _update_rows(
    steps: Sequence[dict[str, float]],
    rollouts: Sequence[dict[str, Any]],
    steps_per_update: int,
    weights_at: WeightsAt,
) -> list[dict[str, float]]:
    """One row per update: its rollout's figures, and the mean over its optimiser steps, under PPO's names.

    TRL reports k3 per token; times the mean length it is KL per response. It is taken at the update's first step, where
    the policy is still the one that wrote the responses; later in the update the estimate would be off-policy.
    """
    rows: list[dict[str, float]] = []
    for update, entry in enumerate(rollouts):
        rollout = {name: value for name, value in entry.items() if name not in ("samples", "step")}
        update_steps = steps[update * steps_per_update : (update + 1) * steps_per_update]
        means = {
            name: sum(row.get(trl_name, 0.0) for row in update_steps) / len(update_steps)
            for name, trl_name in TRL_METRICS.items()
        }
        per_token = update_steps[0].get("kl", 0.0)
        kl = {"kl": per_token * rollout["length"], "kl_per_token": per_token}
        rows.append({"step": update + 1, **rollout, **means, **kl})
        rows[-1] |= run_detectors(rows, weights_at(update + 1))[0]
    return rows


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("grpo")
