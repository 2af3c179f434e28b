"""Padding of token ids, and position ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["pad_ids", "position_ids"]


def pad_ids(
    rows: Sequence[Sequence[int]], pad_token_id: int, *, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Pad token ids to [B, T]; the mask [B, T] is true on those of the rows."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id, padding_side=side)
    return ids, pad_sequence(masks, batch_first=True, padding_side=side)


def position_ids(mask: Tensor) -> Tensor:
    """cumsum(mask) − mask: the first real token has position 0 whatever the padding before it."""
    return mask.long().cumsum(-1) - mask.long()
