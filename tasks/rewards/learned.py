"""Learned rewards: the preference models that training sees, and the gold judge that it never sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.core.errors import ModelError
from tasks.core.models import ADAPTER, device, load_beside, load_scorer, load_tokenizer
from tasks.rewards.familiarity import Familiarity
from tasks.rl.rollout import position_ids

__all__ = [
    "COMBINATIONS",
    "FAMILIARITY",
    "NORMALISATION",
    "GoldJudge",
    "Member",
    "RewardModel",
    "TextScorer",
    "encode",
    "member_folder",
]

NORMALISATION = f"{ADAPTER}/normalisation.json"
FAMILIARITY = f"{ADAPTER}/familiarity.safetensors"
MEMBERS = f"{ADAPTER}/members"

COMBINATIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "mean": lambda scores, _: scores.mean(0),
    "worst": lambda scores, _: scores.amin(0),
    "uncertainty": lambda scores, coef: scores.mean(0) - coef * scores.var(0, correction=0),
}
"""`reward.combine` → scores of K members [K, B] as one [B] (Coste et al. 2023, arXiv 2310.02743, equations 3 to 5)."""


def member_folder(reward_model: Path, number: int) -> Path:
    """Where a member of the ensemble lies, laid out as a stage's folder; the first, 0, is the stage itself."""
    return reward_model / MEMBERS / str(number) if number else reward_model


def encode(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """The ids of a text with the end token behind it, cut at max_length: what every scorer reads."""
    ids: list[int] = tokenizer(text, truncation=True, max_length=max_length - 1).input_ids
    return [*ids, tokenizer.eos_token_id]


class TextScorer:
    """Scores texts by the linear head at each text's end token."""

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int, batch_size: int = 32, adapter: str | None = None
    ) -> None:
        """Pair a model with its tokenizer; `adapter` is the one that is switched on, where the model has several."""
        self._model = model
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._batch_size = batch_size
        self._adapter = adapter

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raw scores, [len(texts)] float32 on the CPU."""
        return self.read(texts)[0]

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Raw scores [N] and the states [N, d] that the head makes them from, float32 on the CPU.

        Equal texts are read once, in batches of like length.
        """
        self._model.eval()
        if self._adapter is not None:
            self._model.set_adapter(self._adapter, inference_mode=True)
        unique = {text: encode(self._tokenizer, text, self._max_length) for text in texts}
        ordered = sorted(unique, key=lambda text: (len(unique[text]), text))
        readings = [
            self._read([unique[text] for text in ordered[start : start + self._batch_size]])
            for start in range(0, len(ordered), self._batch_size)
        ]
        place = {text: row for row, text in enumerate(ordered)}
        rows = [place[text] for text in texts]
        scores, states = (torch.cat(parts)[rows] for parts in zip(*readings, strict=True))
        return scores, states

    def _read(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        where = device()
        with _inputs_of(self._model.score) as states:
            logits: Tensor = self._model(
                input_ids=ids.to(where), attention_mask=mask.long().to(where), position_ids=position_ids(mask).to(where)
            ).logits
        at_the_end = states[0][range(len(rows)), [len(row) - 1 for row in rows]]
        return logits.squeeze(-1).float().cpu(), at_the_end.float().cpu()


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, what the module is given is kept."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        yield kept
    finally:
        handle.remove()


@dataclass(frozen=True)
class Member:
    """One preference model; its raw scores of responses of the SFT policy have this mean and spread."""

    scorer: TextScorer
    mean: float
    std: float

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Normalised scores [N], (raw − μ) / σ, and the states [N, d] behind them."""
        raw, states = self.scorer.read(texts)
        return (raw - self.mean) / self.std, states


class RewardModel:
    """One preference model, or an ensemble, whose members differ in their seed alone, on one trunk."""

    def __init__(
        self,
        members: Sequence[Member],
        familiarity: Familiarity,
        *,
        combine: str = "mean",
        uncertainty_coef: float = 0.0,
    ) -> None:
        """Put members together.

        Args:
            familiarity: of the first member's states.
            combine: one of `COMBINATIONS`.
            uncertainty_coef: what `uncertainty` takes off per unit of variance among members.
        """
        self._members = members
        self._familiarity = familiarity
        self._combined = COMBINATIONS[combine]
        self._uncertainty_coef = uncertainty_coef

    @classmethod
    def load(
        cls, base_model: Path, sft: Path, reward_model: Path, *, combine: str = "mean", uncertainty_coef: float = 0.0
    ) -> RewardModel:
        """Load what the reward_model stage wrote.

        Raises:
            ModelError: the folder is incomplete.
        """
        count = 1 + len(list((reward_model / MEMBERS).glob("*")))
        folders = [member_folder(reward_model, number) for number in range(count)]
        facts = [_facts(folder) for folder in folders]
        model, tokenizer = load_scorer(base_model, sft, reward_model), load_tokenizer(base_model)
        names = [model.active_adapter, *(f"member_{number}" for number in range(1, count))]
        for name, folder in zip(names[1:], folders[1:], strict=True):
            load_beside(model, name, folder)
        members = [
            Member(TextScorer(model, tokenizer, max_length=own["max_length"], adapter=name), own["mean"], own["std"])
            for name, own in zip(names, facts, strict=True)
        ]
        familiarity = Familiarity.load(reward_model / FAMILIARITY)
        return cls(members, familiarity, combine=combine, uncertainty_coef=uncertainty_coef)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Rewards, [B]: those of the members, combined."""
        return self.measured(prompts, responses)[0]

    def members(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Each member's normalised rewards, [K, B]."""
        texts = _joined(prompts, responses)
        return torch.stack([member.read(texts)[0] for member in self._members])

    def measured(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards [B], and what the same pass tells about them.

        `unfamiliar` [B] is 1 where the text is unlike those that people compared; `disagreement` [B], where there are
        several members, their standard deviation.
        """
        texts = _joined(prompts, responses)
        readings = [member.read(texts) for member in self._members]
        scores = torch.stack([own for own, _ in readings])
        measures = {"unfamiliar": self._familiarity.unfamiliar(readings[0][1])}
        if len(readings) > 1:
            measures["disagreement"] = scores.std(0, correction=0)
        return self._combined(scores, self._uncertainty_coef), measures


class GoldJudge:
    """The direct-assessment judge: its score estimates the mean human rating, in points of the rating scale."""

    def __init__(self, scorer: TextScorer) -> None:
        self._scorer = scorer

    @classmethod
    def load(cls, base_model: Path, gold_judge: Path) -> GoldJudge:
        """Load what the gold_judge stage wrote.

        Raises:
            ModelError: the folder is incomplete.
        """
        max_length = _facts(gold_judge)["max_length"]
        scorer = load_scorer(base_model, None, gold_judge)
        return cls(TextScorer(scorer, load_tokenizer(base_model), max_length=max_length))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Estimated mean ratings, [len(prompts)]."""
        return self._scorer(_joined(prompts, responses))


def _joined(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / NORMALISATION
    if not path.is_file():
        raise ModelError(f"{path} does not exist: run the stage that writes it")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts
