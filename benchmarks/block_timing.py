"""What benchmarks of single blocks have in common: contenders in turn, their medians, what they keep, one JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

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


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, elapsed on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(passes: Passes, rounds: int, device: str) -> dict[str, float]:
    """Of forward and backward, the contenders in turn; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, forward in passes.items():
            start = clock(device)
            forward().sum().backward()
            times[name].append(clock(device) - start)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


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
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions |= {"python": platform.python_version(), "threads": torch.get_num_threads(), "device": args.device}
        capability = torch.backends.cpu.get_cpu_capability()
        args.output.write_text(json.dumps({**versions, "capability": capability, "rows": rows}, indent=1) + "\n")
