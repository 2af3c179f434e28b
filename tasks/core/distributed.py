"""Collective operations for distributed training, started by torchrun or accelerate.

Each rank computes its share of every batch, and all of them end up with the same model. Where a process is alone,
every function gives back what it was given.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, pad_across_processes
from accelerate.utils import reduce as reduce_tensors
from torch import Tensor, nn

from tasks.core.errors import ConfigError, TrainingError

__all__ = [
    "all_gather", "all_gather_texts", "all_reduce_gradients", "all_reduce_sum", "barrier", "check_in_sync",
    "init_distributed", "per_rank", "rank", "shard", "world_size",
]  # fmt: skip

ItemT = TypeVar("ItemT")


def init_distributed() -> None:
    """Initialise the process group, if there are several ranks, and select this rank's GPU."""
    PartialState(cpu=not torch.cuda.is_available())


def barrier() -> None:
    """Wait for all ranks."""
    PartialState().wait_for_everyone()


def rank() -> int:
    """This process's number, from 0."""
    return int(PartialState().process_index)


def world_size() -> int:
    """Number of ranks."""
    return int(PartialState().num_processes)


def per_rank(total: int, what: str) -> int:
    """Divide a total equally among the ranks; a ConfigError if it does not divide equally."""
    if total % world_size():
        raise ConfigError(f"{what} is {total}, which {world_size()} ranks cannot share equally; change it or --ranks")
    return total // world_size()


def shard(items: Sequence[ItemT], what: str) -> Sequence[ItemT]:
    """This rank's consecutive shard of the items; a ConfigError as in `per_rank`."""
    size = per_rank(len(items), what)
    return items[rank() * size : (rank() + 1) * size]


def all_gather(tensor: Tensor, *, pad: int = 0, left: bool = False) -> Tensor:
    """Gather every rank's rows [B, ...] into one tensor [ranks · B, ...] on the tensor's device, in rank order.

    Args:
        pad: fills the second dimension of the shorter ones.
        left: whether it does so before what is there.
    """
    if world_size() == 1:
        return tensor
    moved = tensor.to(PartialState().device, torch.uint8 if tensor.dtype is torch.bool else None)
    rows = gather(pad_across_processes(moved, dim=1, pad_index=pad, pad_first=left))
    return rows.to(tensor.device, tensor.dtype)


def all_gather_texts(local_texts: Sequence[str]) -> list[str]:
    """Gather every rank's texts, in rank order."""
    return list(gather_object(list(local_texts)))


def all_reduce_sum(local: Any) -> Any:
    """Sum a dataclass of tensors over the ranks."""
    if world_size() == 1:
        return local
    detached = type(local)(**{field.name: getattr(local, field.name).detach().cpu() for field in fields(local)})
    return reduce(operator.add, gather_object([detached]))


def check_in_sync(weights: Iterable[Tensor]) -> None:
    """Raise a TrainingError if the ranks have different weights."""
    sums = all_gather(torch.stack([weight.detach().double().sum() for weight in weights]).unsqueeze(0))
    if not torch.equal(sums, sums[:1].expand_as(sums)):
        ranks = f"the {world_size()} ranks"
        raise TrainingError(f"{ranks} ended with different weights: their gradients were not put together")


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all ranks."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = reduce_tensors(parameter.grad, "sum")
