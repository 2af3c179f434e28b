"""Responses of the last run's policies to its prompts, for people to compare."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from tasks.config.training import GenerationParams
from tasks.core.errors import ConfigError
from tasks.core.rows import Prompt, read_rows
from tasks.labelling.pairs import Scores, Written
from tasks.models.loading import policy_stages
from tasks.rewards.reward_model import RewardModel, member_folder
from tasks.rl.rollout import load_sampler, sample_in_batches

__all__ = ["check_policies", "ensemble", "prompts", "written"]

SAMPLES = 2
"""Of each policy to each prompt, so that one policy alone makes a pair."""


def check_policies(policies: Sequence[str], artifacts: Path) -> list[str]:
    """The policies, or all that the last run left where none are named.

    Raises:
        ConfigError: one is not there.
    """
    found = policy_stages(artifacts)
    if missing := [policy for policy in policies if policy not in found]:
        raise ConfigError(
            f"--from: no policy {', '.join(missing)} in {artifacts}; there are: {', '.join(found) or 'none'}"
        )
    if not found:
        raise ConfigError(f"no policy in {artifacts} that could write: `rlhf run` first")
    return list(policies) or found


def prompts(artifacts: Path, split: str, count: int, *, seed: int) -> list[str]:
    """Up to so many prompts of the split, in an order that the seed fixes."""
    rows = read_rows(artifacts / "prepare" / "prompts" / f"{split}.jsonl", Prompt)
    random.Random(f"{seed}/{split}/ask").shuffle(rows)
    return [row.prompt for row in rows[:count]]


def written(
    policies: Sequence[str], asked: Sequence[str], generation: GenerationParams, artifacts: Path, *, seed: int
) -> dict[str, list[Written]]:
    """Prompt → what the policies wrote to it; one policy at a time is in memory."""
    responses: dict[str, list[Written]] = {prompt: [] for prompt in asked}
    for policy in policies:
        sampler, generator = load_sampler(artifacts, policy, generation), torch.Generator().manual_seed(seed)
        for rollout in sample_in_batches(sampler, asked, generator, samples_per_prompt=SAMPLES):
            for prompt, text in zip(rollout.prompt_texts, rollout.texts, strict=True):
                responses[prompt].append(Written(policy, text))
    return responses


def ensemble(artifacts: Path) -> Scores:
    """Each member's rewards.

    Raises:
        ConfigError: there are not several members.
    """
    stage = artifacts / "reward_model"
    if not member_folder(stage, 1).is_dir():
        raise ConfigError(
            "--by disagreement needs a reward model with at least two members: `rlhf run reward_model "
            "-S reward_model.members=3`, or ask --by random"
        )
    return RewardModel.load(artifacts / "base_model", artifacts / "sft", stage).member_scores
