"""Padding on either side, with the mask of what is no padding, and positions that skip it."""

from __future__ import annotations

import pytest

from tasks.models.loading import pad_ids, position_ids


@pytest.mark.parametrize(
    ("side", "ids", "mask", "positions"),
    [
        ("left", [[7, 8], [3, 9]], [[True, True], [False, True]], [[0, 1], [0, 0]]),
        ("right", [[7, 8], [9, 3]], [[True, True], [True, False]], [[0, 1], [0, 1]]),
    ],
)
def test_rows_are_padded_on_one_side(
    side: str, ids: list[list[int]], mask: list[list[bool]], positions: list[list[int]]
) -> None:
    padded, is_real = pad_ids([[7, 8], [9]], 3, side=side)
    assert padded.tolist() == ids
    assert is_real.tolist() == mask
    assert position_ids(is_real).tolist() == positions


def test_a_row_without_tokens_is_all_padding() -> None:
    padded, mask = pad_ids([[], [5]], 0, side="left")
    assert padded.tolist() == [[0], [5]]
    assert mask.tolist() == [[False], [True]]
