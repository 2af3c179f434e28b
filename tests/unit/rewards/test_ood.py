"""Distances from the training texts, against numpy's, scikit-learn's and figures worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from tasks.core.errors import ModelError, TrainingError
from tasks.rewards.ood import MahalanobisOOD

WIDTH = 24


def states(count: int, seed: int, *, spread: float = 1.0) -> torch.Tensor:
    """States whose dimensions depend on one another and differ in scale."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, WIDTH)
    return spread * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixing + 5.0


def test_distance_is_the_root_of_the_quadratic_form() -> None:
    training, other = states(200, 1), states(7, 2, spread=3.0)
    fitted = MahalanobisOOD.fit(training, states(50, 3))
    precision = np.linalg.inv(LedoitWolf().fit(training.double().numpy()).covariance_)
    gaps = (other - training.mean(0)).double().numpy()
    expected = np.sqrt(np.einsum("nd,de,ne->n", gaps, precision, gaps))
    np.testing.assert_allclose(fitted.distances(other).numpy(), expected, rtol=1e-4)


def test_one_in_a_hundred_held_out_texts_is_unfamiliar_and_what_lies_elsewhere_is() -> None:
    heldout = states(1000, 2)
    fitted = MahalanobisOOD.fit(states(400, 1), heldout)
    assert fitted.is_ood(heldout).sum() == 10
    assert fitted.is_ood(states(2000, 3)).mean().item() == pytest.approx(0.01, abs=0.008)
    assert fitted.is_ood(states(50, 4, spread=10.0)).tolist() == [1.0] * 50
    assert fitted.is_ood(fitted.mean.unsqueeze(0)).tolist() == [0.0]


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    fitted = MahalanobisOOD.fit(states(100, 1), states(100, 2))
    fitted.save(tmp_path / "ood.safetensors")
    again = MahalanobisOOD.load(tmp_path / "ood.safetensors")
    assert torch.equal(again.distances(states(9, 3)), fitted.distances(states(9, 3)))
    assert again.threshold == pytest.approx(fitted.threshold, rel=1e-6)
    with pytest.raises(ModelError, match=r"other\.safetensors does not exist: run the stage reward_model"):
        MahalanobisOOD.load(tmp_path / "other.safetensors")


def test_states_that_do_not_vary_are_no_measure() -> None:
    with pytest.raises(TrainingError, match="sees no difference between its 5 training texts"):
        MahalanobisOOD.fit(torch.ones(5, 3), torch.ones(2, 3))
