"""Agreement between ranks: what one rank fails at, every rank raises, so that none waits for the others for
ever."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from .core import CheckpointingException

T = TypeVar("T")
K = TypeVar("K")
Group = dist.ProcessGroup | None


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process's rank in `group` and the group's size; (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_from_all(value: T, group: Group = None) -> list[T]:
    """The values of all ranks, by rank, on every rank. Communicates pickled bytes."""
    _, size = rank_and_size(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def gather_entries(own: dict[K, T], group: Group = None) -> dict[K, T]:
    """The entries of all ranks' dictionaries in one, on every rank; of equal keys the last rank's. Communicates pickled
    bytes."""
    return {key: value for entries in gather_from_all(own, group) for key, value in entries.items()}


def broadcast_from_first(value: T, group: Group = None) -> T:
    """The value that the first rank of `group` has, on every rank."""
    _, size = rank_and_size(group)
    if size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return values[0]


def raise_on_all_ranks(error: Exception | None, task: str, group: Group = None) -> None:
    """Raise a `CheckpointingException` on every rank if any rank has an `error`; equal messages are shown
    once."""
    messages = gather_from_all(None if error is None else describe(error), group)
    if not any(messages):
        return
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message is not None:
            ranks.setdefault(message, []).append(rank)
    several = len(messages) > 1
    lines = [f"{message} (rank {', '.join(map(str, at))})" if several else message for message, at in ranks.items()]
    raise CheckpointingException(f"{task}: " + "\n".join(lines)) from error


def describe(error: Exception) -> str:
    """Text of an error; its class is named where the text alone says too little."""
    if isinstance(error, CheckpointingException):
        return str(error)
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error)):
        first_line = str(error).strip().splitlines()[0]
        return f"torch could not write a file, probably because the disk is full ({first_line})"
    return str(error) if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"


@contextmanager
def together(task: str, group: Group = None) -> Iterator[None]:
    """A step that all ranks of `group` take, at the end of which either all go on or all raise."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure, task, group)


def on_first_rank(task: str, step: Callable[[], T], group: Group = None) -> T:
    """Result of `step`, which only the first rank of `group` runs, on every rank."""
    result: Any = None
    with together(task, group):
        if rank_and_size(group)[0] == 0:
            result = step()
    return broadcast_from_first(result, group)
