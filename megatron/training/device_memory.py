"""Cached device memory returned, and allocations recorded: `--empty-unused-memory-level`, `--record-memory-history`."""

from __future__ import annotations

from typing import Any

import torch

from megatron.core import device

MAX_ENTRIES = 100_000
"""Allocations and frees that are remembered, the latest ones."""


def release_unused(args: Any, level: int) -> None:
    """Return cached memory to the driver if that is asked for at this place.

    Args:
        level: of the place: 1 after forward and backward, 2 after the optimizer.
    """
    if args.empty_unused_memory_level >= level:
        device.release_cached_memory()


def start_memory_history() -> None:
    """Remember allocations and where they came from, from now on; CUDA only."""
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)


def write_memory_history(path: str) -> None:
    """This rank's memory and its history, for https://pytorch.org/memory_viz; a pickle."""
    torch.cuda.memory._dump_snapshot(path)
