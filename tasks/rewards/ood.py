"""Out-of-distribution detection for reward models, by Mahalanobis distance of the head's input states.

One Gaussian is fitted to the states of the training texts (Lee et al. 2018, arXiv 1807.03888, equation 2, with one
class). What lies further out than nearly all held-out texts of people is out of distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.core.errors import ModelError, TrainingError
from tasks.rewards.scorers import PromptResponse, TextScorer

__all__ = ["FIT_TEXTS", "MahalanobisOOD", "fit_ood_detector"]

FIT_TEXTS = 512
"""Training texts that the detector is fitted on. A hundred find nearly what all 1,600 find: all made-up nonsense, four
fifths of shuffled sentences, and 34 instead of 30 % of SFT's responses, most of them cut short."""

QUANTILE = 0.99  # of held-out texts, which count as in-distribution


@dataclass(frozen=True)
class MahalanobisOOD:
    """Gaussian of the training texts' states, its covariance Σ shrunk (Ledoit & Wolf 2004): few texts a dimension."""

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
