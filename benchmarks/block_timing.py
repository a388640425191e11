"""What benchmarks of single blocks have in common: contenders in turn, their medians, what they keep, one JSON file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import take_turns, versions, write_result

Passes = Mapping[str, Callable[[], Tensor]]
"""Contender -> its forward pass."""


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """That autograd stores for backward."""
    stored: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in stored.values())


def both_passes(forward: Callable[[], Tensor]) -> None:
    """Forward and backward."""
    forward().sum().backward()


def median_seconds(passes: Passes, rounds: int, device: str) -> dict[str, float]:
    """Of forward and backward, the contenders in turn; a first round is not counted."""
    contenders = {name: partial(both_passes, forward) for name, forward in passes.items()}
    return take_turns(contenders, rounds, device=device).medians()


def figures(passes: Passes, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Milliseconds and MiB kept of each contender."""
    return {
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "kept_mb": {name: kept_bytes(forward) / 2**20 for name, forward in passes.items()},
    }


def run(
    description: str | None,
    shapes: tuple[dict[str, int], ...],
    measure: Callable[[dict[str, int], int, str], dict[str, Any]],
    summary: Callable[[dict[str, Any]], str],
    rounds: int,
) -> None:
    """Measure all shapes, print, and write down if asked to.

    Args:
        measure: (shape, rounds, device) -> `figures` of it, and what else is to be kept.
        summary: what to say of them.
        rounds: unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    rows = []
    for shape in shapes:
        row = measure(dict(shape), args.rounds, args.device)
        rows.append(row)
        print(*(f"{name} {value}" for name, value in shape.items()), sep=", ")
        for name, milliseconds in row["milliseconds"].items():
            print(f"  {name:28} {milliseconds:9.1f} ms {row['kept_mb'][name]:9.1f} MiB kept")
        print(f"  {summary(row)}")
    if args.output:
        write_result(args.output, args.device, versions=versions("torch", "transformers"), rows=rows)
