"""GRPO by TRL against the same composed reward as PPO, with the same rollouts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from tasks.core import ranks, tracking
from tasks.core.errors import TrainingError
from tasks.core.files import write_json
from tasks.core.models import load_reference, load_tokenizer, lora_config, prepare_process, save_adapter
from tasks.core.schema import Prompt, read_rows, write_rows
from tasks.core.sections.environment import ENVIRONMENT, EnvironmentParams
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.grpo import GRPOParams
from tasks.core.sections.lora import LoraParams
from tasks.core.sections.reward import RewardParams
from tasks.core.training import HistoryCallback, PolicyKeeper, common_arguments, train_or_resume, write_history
from tasks.rewards.composition import CompositeReward, load_reward
from tasks.rl.checks import DegenerationWatch
from tasks.rl.conversation import Conversations, Earned, Talk, load_talk
from tasks.rl.detectors import watch
from tasks.rl.masking import up_to_last
from tasks.rl.rollout import generate, seeded
from tasks.rl.shaping import discounted, missing_eos_penalty

__all__ = ["ConversationRollouts", "Rollouts", "Said", "grpo"]

CHECKPOINT_UPDATES = 4
"""Updates between checkpoints: each has at least a rollout's work in it, so they cost little."""

SAMPLE = ("step", "prompt", "response", "score")
"""The order of a sample's keys; a checkpoint sorts them."""

TRL_NAMES = {
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
    *,
    base_model: Path,
    sft: Path,
    reward_model: Path,
    prepare: Path,
    out: Path,
) -> None:
    """Train the policy with TRL's GRPOTrainer: advantages are rewards standardised within each prompt's group.

    With an environment a sample is a whole conversation, see `ConversationRollouts`.

    Writes adapter/, policies/ (the adapter of every `keep_every` updates), history.csv (one row per update),
    samples.jsonl and metrics.json (the last update's figures).
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    prompts = read_rows(prepare / "prompts" / "train.jsonl", Prompt)
    composed = load_reward(reward, prompts, base_model=base_model, sft=sft, reward_model=reward_model)
    score = _Score(composed, params, tokenizer.eos_token_id, environment.gamma if environment else 1.0)
    rollouts: Rollouts | ConversationRollouts = Rollouts(params, generation, tokenizer, policy_seed)
    if environment:
        talk = load_talk(environment, prompts, tokenizer, generation)
        rollouts = ConversationRollouts(params, talk, [row.prompt for row in prompts], policy_seed)
    history = HistoryCallback("grpo")
    keeper = PolicyKeeper(params.keep_every, out)
    torch.manual_seed(policy_seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        trainer = GRPOTrainer(
            model=load_reference(base_model, sft),
            peft_config=lora_config(lora, TaskType.CAUSAL_LM),
            reward_funcs=[score],
            args=_arguments(params, generation, policy_seed),
            train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in prompts]),
            processing_class=tokenizer,
            callbacks=[history, _EachUpdate(params, history, keeper, composed.slopes_at)],
            rollout_func=rollouts,
        )
    train_or_resume(trainer)
    save_adapter(trainer.model, out)
    keeper.finish()
    kept = _rollouts(trainer.state)
    rows = _rounds(history.rows, kept, params.epochs * params.minibatches, composed.slopes_at)
    write_history(out / "history.csv", rows)
    samples = [sample for entry in kept for sample in entry["samples"]]
    write_rows(out / "samples.jsonl", ({name: sample[name] for name in SAMPLE} for sample in samples))
    write_json(out / "metrics.json", rows[-1])


def _arguments(params: GRPOParams, generation: GenerationParams, seed: int) -> GRPOConfig:
    ranks.share_of(params.prompts_per_update, "grpo.prompts_per_update")
    whole = params.prompts_per_update * params.samples_per_prompt // params.minibatches
    batch = ranks.share_of(whole, "the size of grpo's minibatches")
    arguments = common_arguments(seed=seed, batch_size=batch, learning_rate=params.learning_rate, epochs=1)
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


Slopes = Callable[[int], Mapping[str, float]]
"""Update → component → what one more of it adds to the reward."""


class Rollouts:
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
            part=ranks.rank(),
            parts=ranks.ranks(),
        )
        trainer.model.train()
        lengths = rollout.response_mask.sum(1).tolist()
        return {
            "prompt_ids": [ids for ids in distinct for _ in range(group)],
            "completion_ids": [row[:n].tolist() for row, n in zip(rollout.responses, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(rollout.logprobs, lengths, strict=True)],
        }


@dataclass(frozen=True)
class Said:
    """What `_Score` has to know of a conversation; TRL hands it on as it is."""

    spoken: str
    transcript: str
    reward: float
    turns: int
    tokens: int
    ended: bool


class ConversationRollouts:
    """TRL's `rollout_func` for conversations; `env_mask` takes the environment's tokens out of loss, KL and entropy.

    TRL's other door, `environment_factory`, does not fit: there an environment's methods are tools, a turn goes to it
    only where the model has written a tool call, and the tokenizer's chat template must know tools, which that of our
    base model does not. Here every turn of the policy is an action, in plain text.
    """

    def __init__(self, params: GRPOParams, talk: Talk, prompts: Sequence[str], seed: int) -> None:
        self._group, self._talk, self._seed = params.samples_per_prompt, talk, seed
        self._places = {prompt: place for place, prompt in enumerate(prompts)}

    def __call__(self, prompts: Sequence[str], trainer: GRPOTrainer) -> dict[str, Any]:
        trainer.model.eval()
        step = trainer.state.global_step
        conversations = self._talk(
            trainer.model,
            [self._places[prompt] for prompt in prompts[:: self._group]],
            self._group,
            lambda turn: seeded(self._seed, step, turn),
        )
        trainer.model.train()
        lengths = up_to_last(conversations.response_mask).sum(1).tolist()
        prompt_lengths = conversations.prompt_mask.sum(1).tolist()

        def rows(tensor: Tensor) -> list[Any]:
            return [row[:n].tolist() for row, n in zip(tensor, lengths, strict=True)]

        return {
            "prompt_ids": [row[-n:].tolist() for row, n in zip(conversations.prompts, prompt_lengths, strict=True)],
            "completion_ids": rows(conversations.responses),
            "logprobs": rows(conversations.logprobs),
            "env_mask": rows(conversations.response_mask.long()),
            "said": _said(conversations),
        }


def _said(conversations: Conversations) -> list[Said]:
    columns = zip(
        conversations.spoken,
        conversations.transcripts,
        conversations.rewards.tolist(),
        conversations.turns.tolist(),
        conversations.response_mask.sum(1).tolist(),
        conversations.ended.tolist(),
        strict=True,
    )
    return [Said(*values) for values in columns]


class _Score:
    """TRL's reward function: the composed reward, with every component kept for the curves and some samples to read.

    They are kept in the trainer's log, which is part of its checkpoints.
    """

    __name__ = "reward"

    def __init__(self, reward: CompositeReward, params: GRPOParams, eos_token_id: int, turn_gamma: float = 1.0) -> None:
        self._reward, self._penalty, self._eos = reward, params.missing_eos_penalty, eos_token_id
        self._turn_gamma = turn_gamma
        self._group = params.samples_per_prompt
        self._steps_per_update = params.epochs * params.minibatches
        self._watch = DegenerationWatch(lambda message: tqdm.write(f"grpo: {message}", file=sys.stderr))

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        trainer_state: Any,
        said: list[Said] | None = None,
        **_: Any,
    ) -> list[float]:
        step = trainer_state.global_step // self._steps_per_update + 1
        said = said or [
            Said(text, text, 0.0, 1, len(ids), ids[-1] == self._eos)
            for text, ids in zip(completions, completion_ids, strict=True)
        ]
        completions, turns = [one.spoken for one in said], torch.tensor([one.turns for one in said])
        earned = Earned(torch.tensor([one.reward for one in said]), turns)
        try:
            outcome = self._reward(prompts, completions, step, {ENVIRONMENT: earned})
        except TrainingError as error:
            raise TrainingError(f"update {step}: {error}") from error
        ended = torch.tensor([one.ended for one in said])
        scores = missing_eos_penalty(discounted(outcome.total, turns, self._turn_gamma), ended, self._penalty)
        whole = outcome.of_all_ranks()
        lengths = ranks.gathered(torch.tensor([one.tokens for one in said]))
        everyones = ranks.gathered(scores)
        prompts, completions = ranks.texts(prompts), ranks.texts(completions)
        transcripts = ranks.texts([one.transcript for one in said])
        means = {
            "reward": whole.total.mean().item(),
            **{f"reward/{name}": values.mean().item() for name, values in whole.components.items()},
            **{name: values.mean().item() for name, values in whole.measures.items()},
            "score_std": everyones.std().item(),
            "length": lengths.sum().item() / len(lengths),
            **self._watch(completions, ranks.gathered(ended), step),
        }
        tracking.log_metrics(means, step=trainer_state.global_step + 1)
        rows = [
            {"step": step, "prompt": prompts[i], "response": transcripts[i], "score": everyones[i].item()}
            for i in range(0, len(prompts), self._group)
        ][:4]
        trainer_state.log_history.append({**means, "samples": rows, "step": trainer_state.global_step + 1})
        tracking.log_samples("samples", rows, step=step)
        return [float(value) for value in scores]


class _EachUpdate(TrainerCallback):
    """After each update keeps the policy and looks for signs of reward hacking."""

    def __init__(self, params: GRPOParams, history: HistoryCallback, keeper: PolicyKeeper, slopes_at: Slopes) -> None:
        self._history, self._keeper, self._slopes_at = history, keeper, slopes_at
        self._steps = params.epochs * params.minibatches

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self._steps == 0:
            self._keeper.keep(state.global_step // self._steps, model)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if len(self._history.rows) < state.global_step or state.global_step % self._steps:
            return
        rows = _rounds(self._history.rows, _rollouts(state), self._steps, self._slopes_at)
        signs, found = watch(rows, self._slopes_at(len(rows)))
        tracking.log_metrics(signs, step=state.global_step)
        for detector, value in found if ranks.rank() == 0 else []:
            tqdm.write(f"grpo: warning: update {len(rows)}: {detector.says(value)}", file=sys.stderr)


def _rollouts(state: TrainerState) -> list[dict[str, Any]]:
    """What `_Score` has kept in the trainer's log."""
    return [entry for entry in state.log_history if "samples" in entry]


def _rounds(
    steps: Sequence[dict[str, float]],
    rollouts: Sequence[dict[str, Any]],
    steps_per_update: int,
    slopes_at: Slopes,
) -> list[dict[str, float]]:
    """One row per update: its rollout's figures, and the mean over its optimiser steps, under PPO's names.

    TRL reports k3 per token; times the mean length it is KL per response. It is taken at the update's first step, where
    the policy is still the one that wrote the responses; later in the update the estimate would be off-policy.
    """
    rows: list[dict[str, float]] = []
    for update, entry in enumerate(rollouts):
        rollout = {name: value for name, value in entry.items() if name not in ("samples", "step")}
        here = steps[update * steps_per_update : (update + 1) * steps_per_update]
        means = {name: sum(row.get(theirs, 0.0) for row in here) / len(here) for name, theirs in TRL_NAMES.items()}
        per_token = here[0].get("kl", 0.0)
        kl = {"kl": per_token * rollout["length"], "kl_per_token": per_token}
        rows.append({"step": update + 1, **rollout, **means, **kl})
        rows[-1] |= watch(rows, slopes_at(update + 1))[0]
    return rows


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("grpo")
