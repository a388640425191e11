"""Which checkpoints stay after a new one is saved, and how the others go: never half of one under its own name."""

from __future__ import annotations

import argparse
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from megatron.training.checkpoint.paths import saved_iterations, unfinished_name


def remove_old_checkpoints(args: argparse.Namespace, folder: Path, newest: int, non_persistent: bool) -> list[int]:
    """Remove what the flags say not to keep; returns the iterations. The first rank alone calls this.

    Checkpoints are renamed at once and deleted in the background: a run that dies meanwhile leaves leftovers that no
    load looks at.
    """
    keep_last = 1 if non_persistent else args.save_keep_last
    every = None if non_persistent else args.save_retain_interval
    if keep_last is None and every is None:
        return []
    gone = outdated(saved_iterations(folder), newest, keep_last or 1, every)
    leftovers = [unfinished_name(folder, iteration) for iteration in gone]
    for iteration, leftover in zip(gone, leftovers):
        os.rename(folder / f"iter_{iteration:07d}", leftover)
    if leftovers:
        threading.Thread(target=_delete, args=(leftovers,), name="remove old checkpoints").start()
    return gone


def outdated(iterations: Iterable[int], newest: int, keep_last: int, every: int | None) -> list[int]:
    """Iterations up to `newest` that are neither among its last `keep_last` nor multiples of `every`.

    >>> outdated([10, 20, 30, 40, 50], newest=40, keep_last=2, every=20)
    [10]
    """
    until = sorted(i for i in iterations if i <= newest)
    return [i for i in until[: max(0, len(until) - keep_last)] if not every or i % every]


def _delete(directories: list[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
