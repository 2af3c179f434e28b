"""TRL's GRPOTrainer on the rollouts of ours: the same advantages, reference log-probabilities, and gradients.

TRL takes our token ids through its `rollout_func`, scores them by the same reward, and computes advantages and
reference log-probabilities by itself. Its loss then gets log-probabilities of sampling that lie off the policy's, so
that ratios leave the clip range. Its `bnpo` averages within a micro-batch, so there it gets the step as one batch.
"""

import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.rl.algorithm import Experience
from tasks.rl.rollout import Rollout
from tests.conftest import letter_tokenizer, tiny_model
from tests.support.tiny_trainer import GRPO_PARAMS, gradients, trainer_of

TOKENIZER = letter_tokenizer("Ġabcdefghijklmnopqrstuvwxyz123")
PROMPTS = ["ab", "c", "def"]
GROUP, BETA, CLIP, LENGTH = 4, 0.3, 0.2, 20
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
SETTINGS = {"prompts_per_update": 3, "samples_per_prompt": GROUP, "clip_range": CLIP, "kl_coef": BETA,
            "missing_eos_penalty": 0.0}  # fmt: skip


def early_letters(completions: list[str], **_: Any) -> list[float]:
    """Reward: the letters before h, over those that there could be."""
    return [sum("a" <= sign < "h" for sign in text) / LENGTH for text in completions]


def moved(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.eval()


def keys(prompts: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor) -> list[str]:
    """The text of each row's token ids, prompt and response."""
    rows = zip(prompts, prompt_mask.bool(), responses, mask.bool(), strict=True)
    return [f"{prompt[shown].tolist()} {response[counts].tolist()}" for prompt, shown, response, counts in rows]


class Sides:
    """The same rollout in both trainers, and log-probabilities of sampling that are off by up to 0.5."""

    def __init__(self, folder: Path) -> None:
        self.ours = trainer_of(
            GRPO_PARAMS.model_copy(update=SETTINGS), moved(get_peft_model(tiny_model(), LORA)),
            lambda prompts, responses: early_letters(responses), tokenizer=TOKENIZER,
            prompts=[Prompt(id=text, prompt=text) for text in PROMPTS],
            generation=GenerationParams(max_new_tokens=LENGTH, temperature=0.8),
        )  # fmt: skip
        self.scored = self.ours.score(self.ours.sample())
        rollout = self.scored.rollout
        self.micro_batches: list[dict[str, Any]] = []
        self.trl = self._trl(folder, rollout)
        self.trl.train()
        shift = 0.5 * (2 * torch.rand(rollout.logprobs.shape, generator=torch.Generator().manual_seed(2)) - 1)
        self.keys = keys(rollout.prompts, rollout.prompt_mask, rollout.responses, rollout.response_mask)
        first = [self.keys.index(key) for key in self.keys]  # equal rows are off by as much
        self.old_logprobs = (rollout.logprobs + shift[first]) * rollout.response_mask
        for batch in self.micro_batches:
            rows = self.rows_of(batch)
            batch["old_per_token_logps"] = self.old_logprobs[rows][:, : batch["completion_ids"].shape[1]]

    def rows_of(self, batch: dict[str, Any]) -> list[int]:
        """Rows of our rollout that TRL has in this batch."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        return [self.keys.index(key) for key in keys(*(batch[name] for name in names))]

    def _trl(self, folder: Path, rollout: Rollout) -> GRPOTrainer:
        answers = defaultdict(list)
        lengths = rollout.response_mask.sum(1).tolist()
        for prompt, row, n in zip(rollout.prompt_texts, rollout.responses, lengths, strict=True):
            answers[prompt].append(row[:n].tolist())

        def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
            ids = [answers[prompt].pop() for prompt in prompts]
            prompt_ids = [TOKENIZER(prompt).input_ids for prompt in prompts]
            return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * len(row) for row in ids]}

        arguments = GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=len(PROMPTS), gradient_accumulation_steps=GROUP,
            num_generations=GROUP, beta=BETA, epsilon=CLIP, temperature=0.8, max_completion_length=LENGTH,
            max_steps=1, learning_rate=0.0, bf16=False, use_cpu=True, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = GRPOTrainer(
                model=tiny_model(), reward_funcs=[early_letters], args=arguments, peft_config=LORA,
                processing_class=TOKENIZER, train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
                rollout_func=rollout_func,
            )  # fmt: skip
        moved(trainer.model)
        self.loss = trainer._compute_loss

        def record(model: Any, inputs: dict[str, Any]) -> Tensor:
            self.micro_batches.append(dict(inputs))
            return 0.0 * sum(weight.sum() for weight in model.parameters() if weight.requires_grad)

        trainer._compute_loss = record
        return trainer

    def gradient_of_ours(
        self, loss_type: str, micro_batch_size: int, **changes: Any
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        algorithm, updater = self.ours.algorithm, self.ours.updater
        algorithm.params = GRPO_PARAMS.model_copy(update=SETTINGS | {"loss_type": loss_type} | changes)
        updater.params = algorithm.params
        entropies = self.ours.policy.entropies(self.scored.rollout) if "top_entropy_share" in changes else None
        experience, _ = algorithm.compute_advantages(replace(self.scored, entropies=entropies))
        values = vars(experience) | {"old_logprobs": self.old_logprobs}
        whole = Experience(**values)
        updater.optimizer.zero_grad()
        total = [updater._backward(part, whole) for part in whole.split(micro_batch_size)]
        metrics = total[0]
        for part in total[1:]:
            metrics = metrics + part
        return gradients(self.ours), metrics.metrics()

    def gradient_of_trl(self, loss_type: str, *, whole: bool = False, **settings: Any) -> dict[str, Tensor]:
        """With these attributes of TRL's trainer, or of its configuration; `whole`: the step as one batch."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"loss_type": loss_type, **settings}.items():
                patch.setattr(self.trl if hasattr(self.trl, name) else self.trl.args, name, value)
            return self._gradient_of_trl(whole=whole or loss_type == "bnpo")

    def _gradient_of_trl(self, *, whole: bool) -> dict[str, Tensor]:
        batches = self.micro_batches
        if whole:
            joined = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages",
                      "old_per_token_logps", "ref_per_token_logps")  # fmt: skip
            batches = [batches[0] | {name: torch.cat([batch[name] for batch in batches]) for name in joined}]
        self.trl.current_gradient_accumulation_steps = self.trl.args.steps_per_generation = len(batches)
        self.trl.model.train()
        self.trl.model.zero_grad()
        for batch in batches:
            self.loss(self.trl.model, batch).backward()
        found = {name: weight.grad for name, weight in self.trl.model.named_parameters()}
        return {f"model.{name}": gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sides(tmp_path_factory.mktemp("trl"))


def test_advantages_and_reference_log_probabilities(sides: Sides) -> None:
    experience, _ = sides.ours.algorithm.compute_advantages(sides.scored)
    assert sum(len(batch["advantages"]) for batch in sides.micro_batches) == len(experience) == 12
    assert len(sides.micro_batches) == GROUP
    for batch in sides.micro_batches:
        rows, mask = sides.rows_of(batch), batch["completion_mask"].bool()
        torch.testing.assert_close(batch["advantages"], experience.advantages[rows, 0], rtol=1e-5, atol=1e-5)
        ours = experience.reference_logprobs[rows][:, : mask.shape[1]]
        torch.testing.assert_close(batch["ref_per_token_logps"][mask], ours[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [12, 5])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_gradients(sides: Sides, loss_type: str, micro_batch_size: int) -> None:
    lengths = sides.scored.rollout.response_mask.sum(1)
    assert lengths.min() < lengths.max() == LENGTH, "with equal lengths the types would hardly differ"
    ours, metrics = sides.gradient_of_ours(loss_type, micro_batch_size)
    theirs = sides.gradient_of_trl(loss_type)
    assert 0.1 < metrics["clip_fraction"] < 0.9, "the example must have clipped and unclipped tokens"
    assert metrics["kl_loss"] > 0.01
    assert ours.keys() == theirs.keys()
    assert max(gradient.abs().max() for gradient in ours.values()) > 0.01
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clip-higher": ("dapo", {"clip_range_high": 0.28}, {"epsilon_high": 0.28}),
    "dual clip": ("dapo", {"dual_clip": 1.3}, {"delta": 1.3}),
    "CISPO": ("cispo", {"clip_range": None, "clip_range_high": 0.25}, {"epsilon_high": 1.25}),
    "GSPO": (
        "grpo",
        {"importance_level": "sequence", "clip_range": 0.03, "kl_coef": 0.0},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.03, "beta": 0.0},
    ),
    "GSPO averaged over tokens": (
        "dapo",
        {"importance_level": "sequence", "clip_range": 0.03, "kl_coef": 0.0},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.03, "beta": 0.0},
    ),
    "top entropy": ("dapo", {"top_entropy_share": 0.3}, {"top_entropy_quantile": 0.3, "whole": True}),
    "entropy": (
        "dapo",
        {"entropy_coef": 0.5},
        {"_entropy_bonus_enabled": True, "use_adaptive_entropy": False, "entropy_coef": 0.5, "whole": True},
    ),
}


@pytest.mark.parametrize("micro_batch_size", [12, 5])
@pytest.mark.parametrize(("loss_type", "ours", "theirs"), VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_variants(
    sides: Sides, loss_type: str, ours: dict[str, Any], theirs: dict[str, Any], micro_batch_size: int
) -> None:
    sides.ours.algorithm.kl_controller.kl_coef = ours.get("kl_coef", BETA)
    found, metrics = sides.gradient_of_ours(loss_type, micro_batch_size, **ours)
    sides.ours.algorithm.kl_controller.kl_coef = BETA
    expected = sides.gradient_of_trl(loss_type, **theirs)
    plain = sides.gradient_of_trl(loss_type)
    assert 0 < metrics["clip_fraction"] < 0.9
    assert any(not torch.allclose(plain[name], expected[name], rtol=1e-2, atol=1e-4) for name in plain), "no effect"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradient_without_truncated_responses(sides: Sides, loss_type: str) -> None:
    """TRL masks truncated completions when it generates: it zeroes their mask, and counts the tokens that are left."""
    has_eos = sides.scored.rollout.has_eos
    assert 0 < has_eos.sum() < len(has_eos)
    ours, _ = sides.gradient_of_ours(loss_type, 5, mask_truncated=True)
    kept = [batch["completion_mask"] * has_eos[sides.rows_of(batch)].unsqueeze(1) for batch in sides.micro_batches]
    tokens = sum(mask.sum() for mask in kept)
    full = sides.micro_batches
    sides.micro_batches = [
        batch | {"completion_mask": mask, "num_items_in_batch": tokens} for batch, mask in zip(full, kept, strict=True)
    ]
    theirs = sides.gradient_of_trl(loss_type)
    sides.micro_batches = full
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
