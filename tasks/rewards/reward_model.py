"""Learned rewards: the reward model (proxy), what is out of its distribution, and the gold judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.core.errors import ModelError, TrainingError
from tasks.models.loading import ADAPTER_DIR, add_adapter, load_reward_model, load_tokenizer
from tasks.rewards.metrics import correlation
from tasks.rewards.scorers import BACKBONE, PRETRAINED_DIR, PromptResponse, TextScorer, load_pretrained_scorer

__all__ = [
    "FIT_TEXTS", "NORMALISATION", "OOD_DETECTOR", "EnsembleMember", "MahalanobisOOD", "RewardModel", "backbone_of",
    "fit_ood_detector", "load_gold_judge", "member_folder",
]  # fmt: skip

NORMALISATION = f"{ADAPTER_DIR}/normalisation.json"
OOD_DETECTOR = f"{ADAPTER_DIR}/ood.safetensors"
MEMBERS = f"{ADAPTER_DIR}/members"

FIT_TEXTS = 512
"""Training texts that the detector is fitted on. A hundred find nearly what all 1,600 find: all made-up nonsense, four
fifths of shuffled sentences, and 34 instead of 30 % of SFT's responses, most of them cut short."""

QUANTILE = 0.99  # of held-out texts, which count as in-distribution

MIN_SPREAD = 1e-6  # a standard deviation below this is rounding error of float32

ENSEMBLE_REDUCTIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "mean": lambda scores, _: scores.mean(0),
    "worst": lambda scores, _: scores.amin(0),
    "uncertainty": lambda scores, coef: scores.mean(0) - coef * scores.var(0, correction=0),
}
"""`reward.ensemble_reduction` → scores of K members [K, B] as one [B] (Coste et al. 2023, arXiv 2310.02743, equations 3
to 5)."""


def member_folder(reward_model: Path, number: int) -> Path:
    """Folder of an ensemble member, with the layout of a stage's folder; member 0 is the stage's folder itself."""
    return reward_model / MEMBERS / str(number) if number else reward_model


@dataclass(frozen=True)
class ScoreHead:
    """One output of a model with its normalisation."""

    mean: float  # μ of the output over responses of the SFT policy, less what their length explains
    std: float  # their spread σ
    length_slope: float = 0.0  # effect of one token on the output, which is subtracted
    weight: float = 1.0

    @classmethod
    def fit(cls, raw: Tensor, lengths: Tensor | None = None, *, weight: float = 1.0) -> ScoreHead:
        """Fit to raw values [N] of SFT responses; the length slope is that of least squares.

        Raises:
            TrainingError: the values do not vary.
        """
        slope = 0.0
        if lengths is not None and lengths.std() > 0:
            slope = (torch.cov(torch.stack([raw, lengths]))[0, 1] / lengths.var()).item()
        residuals = cls(0.0, 1.0, slope).debias(raw, lengths)
        if len(raw) < 2 or residuals.std() < MIN_SPREAD:
            raise TrainingError(
                f"the raw reward does not vary over the {len(raw)} responses of the SFT policy that normalise it; "
                "raise reward_model.normalisation_samples or learning_rate, or choose another reward_model.pretrained"
            )
        return cls(residuals.mean().item(), residuals.std().item(), slope, weight)

    def debias(self, raw: Tensor, lengths: Tensor | None) -> Tensor:
        """Raw values [N] less the effect of their length."""
        return raw if lengths is None or not self.length_slope else raw - self.length_slope * lengths

    def to_dict(self) -> dict[str, float]:
        """Its part of normalisation.json."""
        return {"mean": self.mean, "std": self.std} | ({"length_slope": self.length_slope} if self.length_slope else {})


@dataclass(frozen=True)
class EnsembleMember:
    """One model with one head, whose name is "", or with a head for each objective."""

    scorer: TextScorer
    heads: Mapping[str, ScoreHead]

    @classmethod
    def fit(
        cls, scorer: TextScorer, samples: Sequence[PromptResponse], weights: Mapping[str, float], *, length_debias: bool
    ) -> tuple[EnsembleMember, Tensor]:
        """Fit the normalisation of the heads on these responses of the SFT policy; also return the states."""
        raw, states = scorer.scores_and_states(samples)
        lengths = scorer.response_lengths(samples) if length_debias else None
        columns = zip(weights.items(), raw.reshape(len(raw), -1).unbind(1), strict=True)
        heads = {name: ScoreHead.fit(values, lengths, weight=weight) for (name, weight), values in columns}
        return cls(scorer, heads), states

    def raw_scores(self, samples: Sequence[PromptResponse]) -> tuple[Tensor, Tensor]:
        """Raw values [N, K] of the heads, debiased for length, and their input states [N, d]."""
        raw, states = self.scorer.scores_and_states(samples)
        lengths = self.scorer.response_lengths(samples) if self._has_length_slope else None
        columns = zip(self.heads.values(), raw.reshape(len(raw), -1).unbind(1), strict=True)
        return torch.stack([head.debias(values, lengths) for head, values in columns], dim=1), states

    def normalise(self, values: Tensor) -> Tensor:
        """[N, K] of `raw_scores` → (x − μ) / σ, [N, K]: in standard deviations of each head over SFT responses."""
        columns = zip(self.heads.values(), values.unbind(1), strict=True)
        return torch.stack([(column - head.mean) / head.std for head, column in columns], dim=1)

    def score(self, normalised: Tensor) -> Tensor:
        """[N, K] → [N], Σ weight · head."""
        columns = zip(self.heads.values(), normalised.unbind(1), strict=True)
        return reduce(add, (head.weight * column for head, column in columns))

    def normalisation_metrics(self) -> dict[str, float]:
        """Mean and standard deviation of each head's raw value, and the length slope where it was removed."""
        keys = {"mean": "raw_mean", "std": "raw_std", "length_slope": "length_slope"}
        rows = [(f"/{name}" if name else "", head.to_dict()) for name, head in self.heads.items()]
        return {keys[key] + suffix: value for suffix, row in rows for key, value in row.items()}

    def length_bias(self, samples: Sequence[PromptResponse], values: Tensor) -> dict[str, float]:
        """Correlation of raw values [N, K] and numbers of tokens, also before length debiasing."""
        lengths = self.scorer.text_lengths(samples)
        metrics = {"length_correlation": correlation(self._raw_score(values), lengths)}
        if self._has_length_slope:
            biased = replace(self, heads={name: replace(head, length_slope=0.0) for name, head in self.heads.items()})
            raw = biased.raw_scores(samples)[0]
            metrics["length_correlation_before"] = correlation(biased._raw_score(raw), lengths)
        return metrics

    @property
    def _has_length_slope(self) -> bool:
        return any(head.length_slope for head in self.heads.values())

    def _raw_score(self, values: Tensor) -> Tensor:
        """[N, K] → [N]: the raw value of a head that is alone, else the score."""
        return values[:, 0] if len(self.heads) == 1 else self.score(self.normalise(values))

    def to_dict(self) -> dict[str, Any]:
        """Content of normalisation.json."""
        if "" in self.heads:
            return self.heads[""].to_dict()
        return {"objectives": {name: {**head.to_dict(), "weight": head.weight} for name, head in self.heads.items()}}


def _parse_heads(normalisation: Mapping[str, Any]) -> dict[str, ScoreHead]:
    """Read what `EnsembleMember.to_dict` wrote."""
    return {name: ScoreHead(**row) for name, row in normalisation.get("objectives", {"": normalisation}).items()}


@dataclass(frozen=True)
class MahalanobisOOD:
    """Gaussian of the training texts' states, its covariance Σ shrunk (Ledoit & Wolf 2004): few texts a dimension.

    The distance is Mahalanobis' (Lee et al. 2018, arXiv 1807.03888, equation 2, with one class). What lies further out
    than nearly all held-out texts of people is out of distribution.
    """

    mean: Tensor  # μ, [d]
    whitening: Tensor  # lower triangle W with WᵀW = Σ⁻¹, [d, d]
    threshold: float  # distance beyond which a text is out of distribution

    @classmethod
    def fit(cls, training: Tensor, heldout: Tensor) -> MahalanobisOOD:
        """Fit to the states [N, d] of training texts; the threshold is a quantile over those of held-out ones [M, d].

        Raises:
            TrainingError: the states of the training texts do not vary.
        """
        from sklearn.covariance import ledoit_wolf  # takes a second

        rows = training.double()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # LAPACK's result depends on their number
        factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(ledoit_wolf(rows.numpy())[0]))
        torch.set_num_threads(threads)
        if failed:
            raise TrainingError(
                f"the reward model sees no difference between its {len(rows)} training texts, so no distance from them "
                "can be measured; raise preferences.train_pairs, or train with a lower learning_rate"
            )
        identity = torch.eye(len(factor), dtype=factor.dtype)
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
        fitted = cls(rows.mean(0).float(), whitening.float().contiguous(), float("inf"))
        return cls(fitted.mean, fitted.whitening, torch.quantile(fitted.distances(heldout), QUANTILE).item())

    def distances(self, states: Tensor) -> Tensor:
        """√((x − μ)ᵀ Σ⁻¹ (x − μ)) of each state x, [N, d] → [N]."""
        return ((states - self.mean) @ self.whitening.T).norm(dim=1)

    def is_ood(self, states: Tensor) -> Tensor:
        """1 for each state beyond the threshold, 0 for the others, [N, d] → [N]."""
        return (self.distances(states) > self.threshold).float()

    def metrics(self, *, sft: Tensor, heldout: Tensor) -> dict[str, float]:
        """The threshold, and the shares beyond it of states of SFT responses and of held-out human texts."""
        return {
            "ood_threshold": self.threshold,
            "ood_share_sft": self.is_ood(sft).mean().item(),
            "ood_share_heldout": self.is_ood(heldout).mean().item(),
        }

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        save_file({name: torch.as_tensor(value) for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> MahalanobisOOD:
        """Read what `save` has written.

        Raises:
            ModelError: there is no such file.
        """
        if not path.is_file():
            raise ModelError(f"{path} does not exist: run the stage reward_model")
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["whitening"], tensors["threshold"].item())


def fit_ood_detector(
    scorer: TextScorer, training: Sequence[PromptResponse], validation: Sequence[PromptResponse]
) -> MahalanobisOOD:
    """Fit to training texts, each counted once; the threshold is set on validation texts."""
    texts = (list(dict.fromkeys(samples)) for samples in (training, validation))
    return MahalanobisOOD.fit(*(scorer.scores_and_states(unique)[1] for unique in texts))


@dataclass(frozen=True)
class RewardModel:
    """One model, or an ensemble whose members differ in their seed alone, on one backbone."""

    members: Sequence[EnsembleMember]
    ood_detector: MahalanobisOOD  # of the first member's states
    ensemble_reduction: str = "mean"  # one of `ENSEMBLE_REDUCTIONS`
    uncertainty_coef: float = 0.0  # penalty of `uncertainty` per unit of variance among members

    @classmethod
    def load(
        cls, base_model: Path, sft: Path, reward_model: Path, reduction: str = "mean", uncertainty_coef: float = 0.0
    ) -> RewardModel:
        """Load the output of the reward_model stage, of whatever kind."""
        ood_detector = MahalanobisOOD.load(reward_model / OOD_DETECTOR)
        if (reward_model / PRETRAINED_DIR).is_dir():
            heads = _parse_heads(_read_normalisation(reward_model))
            members = [EnsembleMember(load_pretrained_scorer(reward_model), heads)]
        else:
            members = _trained_members(base_model, sft, reward_model)
        return cls(members, ood_detector, reduction, uncertainty_coef)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Rewards, [B]: the members' scores, reduced."""
        return self.score_with_metrics(prompts, responses)[0]

    def member_scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Each member's normalised rewards, [K, B]."""
        return self._outputs(prompts, responses)[0]

    def score_with_metrics(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards [B], and metrics [B] of the same forward pass.

        `ood_share` is 1 where the text is out of distribution; `objective/<name>`, of several objectives, is the
        members' mean of that head; `disagreement`, of several members, their standard deviation.
        """
        scores, heads, states = self._outputs(prompts, responses)
        metrics = {"ood_share": self.ood_detector.is_ood(states)}
        names = list(self.members[0].heads)
        if len(names) > 1:
            columns = torch.stack(heads).mean(0).unbind(1)
            metrics |= {f"objective/{name}": values for name, values in zip(names, columns, strict=True)}
        if len(scores) > 1:
            metrics["disagreement"] = scores.std(0, correction=0)
        return ENSEMBLE_REDUCTIONS[self.ensemble_reduction](scores, self.uncertainty_coef), metrics

    def _outputs(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Score of each member [K, B], its normalised heads, K × [B, heads], and the first member's states."""
        samples = list(zip(prompts, responses, strict=True))
        outputs = [member.raw_scores(samples) for member in self.members]
        heads = [member.normalise(values) for member, (values, _) in zip(self.members, outputs, strict=True)]
        scores = [member.score(values) for member, values in zip(self.members, heads, strict=True)]
        return torch.stack(scores), heads, outputs[0][1]


def backbone_of(base_model: Path, sft: Path, reward_model: Path) -> tuple[Path, Path | None]:
    """Backbone of the heads, as arguments of `load_reference`: its own if it has one, else the SFT model."""
    backbone = reward_model / BACKBONE
    return (backbone, None) if backbone.is_dir() else (base_model, sft)


def _trained_members(base_model: Path, sft: Path, reward_model: Path) -> list[EnsembleMember]:
    """Load every member: adapters on one backbone, or models of their own."""
    count = 1 + len(list((reward_model / MEMBERS).glob("*")))
    normalisations = [_read_normalisation(member_folder(reward_model, number)) for number in range(count)]
    backbone, heads = backbone_of(base_model, sft, reward_model), len(_parse_heads(normalisations[0]))
    model: Any = None
    tokenizer, members = load_tokenizer(backbone[0]), []
    for number, normalisation in enumerate(normalisations):
        folder, name = member_folder(reward_model, number), f"member_{number}" if number else "default"
        if isinstance(model, PeftModel):
            add_adapter(model, name, folder)
        else:
            model = load_reward_model(*backbone, folder, heads=heads)
        scorer = TextScorer(model, tokenizer, adapter=name if isinstance(model, PeftModel) else None)
        members.append(EnsembleMember(scorer, _parse_heads(normalisation)))
    return members


def load_gold_judge(base_model: Path, gold_judge: Path) -> Callable[[Sequence[str], Sequence[str]], Tensor]:
    """Load a function of prompts and responses that estimates mean human ratings [B], in points of their scale."""
    scorer = TextScorer(load_reward_model(base_model, None, gold_judge), load_tokenizer(base_model))
    return lambda prompts, responses: scorer(list(zip(prompts, responses, strict=True)))


def _read_normalisation(folder: Path) -> dict[str, Any]:
    path = folder / NORMALISATION
    if not path.is_file():
        raise ModelError(f"{path} does not exist: run the stage that writes it")
    normalisation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return normalisation
