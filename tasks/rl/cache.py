"""A key–value cache of fixed length for sampling: written in place, never copied as it grows."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["PreallocatedCache"]


class PreallocatedCache(Cache):
    """Cache of `capacity` tokens per layer whose rows can be repeated and dropped."""

    def __init__(self, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=cast(type[CacheLayerMixin], partial(_Layer, capacity)))

    def repeat(self, times: int) -> None:
        """Row b becomes rows b·times … b·times + times − 1."""
        for layer in cast(list[_Layer], self.layers):
            layer.buffers = [buffer.repeat_interleave(times, 0) for buffer in layer.buffers]

    def compact(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Copy the source rows over the target rows, and keep the first `rows`."""
        for layer in cast(list[_Layer], self.layers):
            for buffer in layer.buffers:
                buffer[targets] = buffer[sources]
            layer.buffers = [buffer[:rows] for buffer in layer.buffers]


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0
        self.buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        both = (key_states, value_states)
        self.buffers = [states.new_empty((*states.shape[:2], self.capacity, states.shape[3])) for states in both]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = states
        keys, values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity
