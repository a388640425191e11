"""What benchmarks have in common: contenders in turn, ratios to a peer and to the machine's ceiling, one JSON file.

A ratio is taken within a round, where the contenders follow each other closely, and the median over the rounds is
given: other load on the machine meets all of them alike. On a CPU the unit is the CPU time of this process unless
another timer is handed over, elsewhere elapsed time after synchronising. The ceiling is sampled in the same run: the
product of two large square matrices, and copying.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


# --- where ----------------------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers are read on, and when."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found: dict[str, Any] = {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"device": properties.name, "device_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found | versions("torch")


def versions(*packages: str) -> dict[str, str]:
    """Of Python and those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        found["torch"] = torch.__version__  # with the kind of build
        if torch.version.cuda:
            found["cuda"] = torch.version.cuda
    return found


def write_result(path: Path, device: str = "cpu", **parts: Any) -> None:
    """One JSON file: the machine, unless `parts` have it, and `parts`; it appears as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps({"machine": machine(device), **parts}, indent=1) + "\n")
    temporary.replace(path)


# --- time -----------------------------------------------------------------------------------------------


def clock(device: str = "cpu") -> float:
    """Seconds: of this process on a CPU, elapsed on a GPU whose work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def stopwatch(into: list[float], device: str = "cpu") -> Iterator[None]:
    """Add the seconds of the block to `into`."""
    start = clock(device)
    yield
    into.append(clock(device) - start)


@dataclass
class Rounds:
    """What contenders took, round by round, without the warm-up."""

    seconds: dict[str, list[float]]
    results: dict[str, list[Any]] = field(default_factory=dict)
    """What each call returned, those of the warm-up included."""

    def median(self, name: str) -> float:
        """Seconds of a contender."""
        return statistics.median(self.seconds[name])

    def medians(self) -> dict[str, float]:
        """Of all contenders."""
        return {name: self.median(name) for name in self.seconds}

    def times_as_fast(self, name: str, peer: str) -> float:
        """Median over the rounds of (time of `peer`) / (time of `name`)."""
        return statistics.median(b / a for a, b in zip(self.seconds[name], self.seconds[peer], strict=True))

    def times_as_fast_as_best(self, name: str, peers: Iterable[str]) -> tuple[float, str] | None:
        """Beside the fastest of `peers` by median, and which one that is; None: there are none."""
        measured = [peer for peer in peers if peer in self.seconds and peer != name]
        best = min(measured, key=self.median, default=None)
        return None if best is None else (self.times_as_fast(name, best), best)


def take_turns(
    contenders: Mapping[str, Callable[..., Any]],
    rounds: int,
    *,
    warmup: int = 1,
    device: str = "cpu",
    arguments: Iterator[tuple[Any, ...]] | None = None,
    between: Callable[[], Any] | None = None,
    until: float | None = None,
    timer: Callable[[], float] | None = None,
) -> Rounds:
    """Call all contenders once in each round.

    Args:
        warmup: rounds before those that count.
        arguments: of the calls of each round; all contenders of a round get the same.
        between: called after each round that counts, such as one that samples the ceiling.
        until: `time.monotonic()` after which no further round begins once one has counted.
        timer: instead of `clock`.
    """
    now = timer or partial(clock, device)
    found = Rounds({name: [] for name in contenders}, {name: [] for name in contenders})
    arguments = itertools.repeat(()) if arguments is None else arguments
    for number in range(warmup + rounds):
        if until is not None and number > warmup and time.monotonic() > until:
            break
        given = next(arguments)
        for name, contender in contenders.items():
            start = now()
            result = contender(*given)
            elapsed = now() - start
            found.results[name].append(result)
            if number >= warmup:
                found.seconds[name].append(elapsed)
        if between is not None and number >= warmup:
            between()
    return found


# --- the machine's ceiling ------------------------------------------------------------------------------


def matmul_peak(
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 0.3,
    size: int | None = None,
    timer: Callable[[], float] | None = None,
) -> float:
    """FLOP/s of a large square product."""
    n = size or (2048 if device == "cpu" else 8192)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return 2 * n**3 * _per_second(lambda: torch.mm(a, b, out=out), device, seconds, timer)


def copy_bandwidth(device: str = "cpu", seconds: float = 0.2, mib: int | None = None) -> float:
    """Bytes/s read and written by copying a piece of memory that no cache holds."""
    mib = mib or (256 if device == "cpu" else 2048)
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * _per_second(lambda: target.copy_(source), device, seconds)


def _per_second(
    work: Callable[[], Any], device: str, seconds: float, timer: Callable[[], float] | None = None
) -> float:
    """How often `work` is done in a second; tried for about so many."""
    now = timer or partial(clock, device)
    work()
    burst = 1 if device == "cpu" else 8  # so that waiting for a GPU is no part of it
    count, start = 0, now()
    while (elapsed := now() - start) < seconds or not count:
        for _ in range(burst):
            work()
        count += burst
    return count / elapsed


@dataclass
class Ceiling:
    """Peaks of one type of numbers, sampled between rounds."""

    dtype: torch.dtype
    device: str = "cpu"
    seconds: float = 0.3
    size: int | None = None
    samples: list[float] = field(default_factory=list)
    timer: Callable[[], float] | None = None

    def sample(self) -> None:
        """Once more."""
        self.samples.append(matmul_peak(self.dtype, self.device, self.seconds, self.size, self.timer))

    @property
    def flops(self) -> float:
        """FLOP/s, the median of the samples; one is taken where there is none."""
        if not self.samples:
            self.sample()
        return statistics.median(self.samples)


def say(*words: Any) -> None:
    """A line for who watches."""
    print(*words, file=sys.stdout, flush=True)
