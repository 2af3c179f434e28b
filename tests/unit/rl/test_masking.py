"""Masked statistics against numbers worked by hand."""

import math

import pytest
import torch

from tasks.rl.masking import (
    check_left_aligned,
    explained_variance,
    masked_mean,
    masked_sum,
    masked_var,
    through_last_true,
    whiten,
    zero_masked,
)

NAN, INF = math.nan, math.inf

# The tokens that count are 1, 2 and 4; the rest is junk that must never be read.
VALUES = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, -INF]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def all_true(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_sum_reads_only_tokens_that_count() -> None:
    assert masked_sum(VALUES, MASK).item() == 7.0
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3.0, 4.0]
    assert masked_sum(VALUES, MASK, dim=0).tolist() == [5.0, 2.0, 0.0]
    flags = torch.tensor([[True, False, True], [True, True, True]])
    assert masked_sum(flags, MASK).item() == 2  # (0,0) and (1,0)


def test_mean_weighs_each_token_the_same() -> None:
    # (1 + 2 + 4) / 3; the mean of the rows' means would be (1.5 + 4) / 2 = 2.75.
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3, rel=1e-15)


def test_variance_is_the_biased_one() -> None:
    # Deviations from 7/3: −4/3, −1/3, 5/3; squares 16/9 + 1/9 + 25/9 = 42/9; divided by 3 (not by 2): 14/9.
    assert masked_var(VALUES, MASK).item() == pytest.approx(14 / 9, rel=1e-15)
    assert masked_var(row(5.0), torch.tensor([[True]])).item() == 0.0


def test_statistics_of_nothing() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_sum(VALUES, nothing).item() == 0.0
    assert math.isnan(masked_mean(VALUES, nothing).item())


def test_whiten_by_hand() -> None:
    # 1 and 3: mean 2, variance 1, so ∓1 / √(1 + 1e-8).
    values = torch.tensor([[1.0, NAN], [3.0, INF]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, False]])
    expected = 1 / math.sqrt(1 + 1e-8)
    result = whiten(values, mask)
    assert result[:, 0].tolist() == pytest.approx([-expected, expected], rel=1e-14)
    assert result[:, 1].tolist() == [0.0, 0.0]
    # ±1e-4: variance 1e-8, so ±1e-4 / √(1e-8 + 1e-8) = ±1/√2; an epsilon of another size or place gives another number.
    values = row(-1e-4, 1e-4)
    assert whiten(values, all_true(values))[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-12)


def test_whiten_agrees_with_the_original_in_tensorflow() -> None:
    # The first and last rows that Huang et al. 2023 print for openai/lm-human-preferences' whiten(shift_mean=False),
    # which adds the mean, 1.6, back: [[0.05080712 0.4381051 0.8254035], …, [2.3745968 2.7618952 3.1491938]].
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
    result = whiten(values, all_true(values)) + 1.6
    assert result[0].tolist() == pytest.approx([0.05080712, 0.4381051, 0.8254035], rel=1e-5)
    assert result[2].tolist() == pytest.approx([2.3745968, 2.7618952, 3.1491938], rel=1e-6)


@pytest.mark.parametrize("values", [row(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), row(3.0)])
def test_whitening_what_does_not_vary_gives_zero(values: torch.Tensor) -> None:
    assert whiten(values, all_true(values)).abs().max().item() < 1e-11


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        # R = (0, 4), so Var(R) = 4
        ((0.0, 4.0), 1.0),  # perfect: R − V = 0
        ((5.0, 9.0), 1.0),  # off by a constant: Var(R − V) = 0; a bias is not what this measures
        ((9.0, 9.0), 0.0),  # constant: Var(R − V) = Var(R)
        ((0.0, 2.0), 0.75),  # R − V = (0, 2): variance 1 against 4
        ((0.0, -4.0), -3.0),  # R − V = (0, 8): variance 16 against 4
    ],
)
def test_explained_variance_by_hand(predicted: tuple[float, float], expected: float) -> None:
    values, returns = row(*predicted, NAN), row(0.0, 4.0, INF)
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 0.3])
def test_explained_variance_of_equal_returns_is_zero(junk: float) -> None:
    # Seven times 0.1: their mean is not exactly 0.1, so a computed variance is not exactly 0 either.
    returns = row(*[0.1] * 7, junk)
    values = row(*range(8))
    mask = torch.tensor([[True] * 7 + [False]])
    assert explained_variance(values, returns, mask).item() == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_explained_variance_looks_at_all_returns_for_equality(sign: float) -> None:
    values = returns = row(sign, 2 * sign)
    assert explained_variance(values, returns, all_true(values)).item() == 1.0


def test_zero_masked_keeps_dtype_and_stops_gradients() -> None:
    values = torch.tensor([[1.0, NAN]], dtype=torch.bfloat16, requires_grad=True)
    kept = zero_masked(values, torch.tensor([[True, False]]))
    kept.sum().backward()
    assert kept.dtype == torch.bfloat16
    assert kept.tolist() == [[1.0, 0.0]]
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (3,), (2, 3)])
def test_a_mask_of_another_shape_or_type_is_refused(shape: tuple[int, ...]) -> None:
    """Two of them would be broadcast; a float mask invites multiplication."""
    mask = torch.ones(shape) if shape == VALUES.shape else torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"response_mask must be boolean and of the values' shape \(2, 3\)"):
        zero_masked(VALUES, mask)


def test_right_padding_and_turns_of_others_are_accepted() -> None:
    check_left_aligned(torch.tensor([[True, True, True], [True, False, True], [True, False, False]]))
    check_left_aligned(torch.tensor([[True]]))


@pytest.mark.parametrize(("mask", "row"), [([[True, False], [False, False]], 1), ([[False, True], [True, True]], 0)])
def test_an_empty_response_and_left_padding_are_refused_and_named(mask: list[list[bool]], row: int) -> None:
    with pytest.raises(ValueError, match=rf"no token counts at the start of rows \[{row}\]"):
        check_left_aligned(torch.tensor(mask))


def test_up_to_last_fills_what_stands_between_and_leaves_the_padding() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    assert through_last_true(mask).dtype is torch.bool
    assert torch.equal(through_last_true(mask), expected)
