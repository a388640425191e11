"""Work that rank 0 does first, with errors that reach every rank instead of leaving the others waiting."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def run_rank_zero_first(work: Callable[[], T], runs_here: bool) -> T | None:
    """The result of `work` on ranks where `runs_here`, None elsewhere; rank 0 is done before the others
    start.

    Communicates over the default process group (two gathers of small objects); without one, just runs `work`.

    Raises:
        RuntimeError: `work` failed on another rank; the rank where it failed raises its own error.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return work() if runs_here else None
    rank = torch.distributed.get_rank()
    result, error = None, None
    for turn in (rank == 0, rank != 0):
        if turn and runs_here:
            try:
                result = work()
            except Exception as caught:  # reported to all ranks, raised again below
                error = caught
        raise_on_all_ranks(error)
    return result


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error. Communicates: gathers one small object from each rank."""
    text = None if error is None else "".join(traceback.format_exception_only(error)).strip()
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    if error is not None:
        raise error
    for rank, other in enumerate(texts):
        if other is not None:
            raise RuntimeError(f"rank {rank} failed: {other}")
