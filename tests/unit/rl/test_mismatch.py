"""Importance weights and mismatch metrics, by hand."""

import math

import pytest
import torch

from tasks.config.rl import RolloutParams
from tasks.core.errors import TrainingError
from tasks.rl.mismatch import check_mismatch, importance_weights, mismatch_metrics

# Probabilities of four tokens under trainer and engine: ratios 2, ½ and 4; the fourth is masked.
OWN = torch.tensor([[0.4, 0.1, 0.8, 0.3]]).log()
ENGINE = torch.tensor([[0.2, 0.2, 0.2, float("nan")]]).log()
MASK = torch.tensor([[True, True, True, False]])


def params(**changes) -> RolloutParams:
    return RolloutParams.model_validate({"engine": "vllm"} | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_clip": 3.0}, [2.0, 0.5, 3.0, 0.0]),
        ({"is_clip": 3.0, "is_mode": "mask"}, [2.0, 0.5, 0.0, 0.0]),
        ({"is_clip": 5.0, "is_level": "sequence"}, [4.0, 4.0, 4.0, 0.0]),  # 2 · ½ · 4
        ({"is_clip": 3.0, "is_level": "sequence"}, [3.0, 3.0, 3.0, 0.0]),
        ({"is_clip": 3.0, "is_level": "sequence", "is_mode": "mask"}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_importance_weights(changes, expected):
    found = importance_weights(OWN, ENGINE, MASK, params(**changes))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_no_gradient_flows_through_the_weights():
    own = OWN.clone().requires_grad_()
    assert not importance_weights(own, ENGINE, MASK, params()).requires_grad


def test_metrics_by_hand():
    found = mismatch_metrics(OWN, ENGINE, MASK, params(is_clip=3.0))
    k3 = [2 - 1 - math.log(2), 0.5 - 1 + math.log(2), 4 - 1 - math.log(4)]
    assert found == pytest.approx(
        {
            "mismatch/kl": sum(k3) / 3,
            "mismatch/mean": 4 * math.log(2) / 3,
            "mismatch/max": math.log(4),
            "mismatch/clipped_share": 1 / 3,
        },
        rel=1e-6,
    )


def test_the_limit_names_the_worst_tokens():
    limit = mismatch_metrics(OWN, ENGINE, MASK, params())["mismatch/kl"]
    check_mismatch(OWN, ENGINE, MASK, ["a b c"], params(max_mismatch_kl=limit * 1.001))
    with pytest.raises(
        TrainingError, match=r"limit rollout.max_mismatch_kl .*: token 3 of 'a b c': -1.609 there, -0.223 here"
    ):
        check_mismatch(OWN, ENGINE, MASK, ["a b c"], params(max_mismatch_kl=limit * 0.999))


def test_a_log_probability_that_is_no_number_is_a_mismatch():
    with pytest.raises(TrainingError, match="KL nan"):
        check_mismatch(OWN, ENGINE, torch.ones_like(MASK), ["a b c"], params())
