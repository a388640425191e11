"""Speed of saving and loading 1 GiB, beside `dd`, `torch.save`, torch's own distributed checkpoint and safetensors.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --folder /disk/scratch --output benchmarks/results/checkpoint.json

The contenders take turns for some rounds in one process; the medians are reported. Every save ends with the bytes on
the disk (fsync). Loads read files that are in the page cache, into memory that is there already, except `torch.load`,
which makes its own. CPU seconds are those of this process and of the processes it started and that have ended, user and
system.

The state is that of a model with sharded Adam: weights cut in two as under tensor parallelism 2, main weights and
moments flattened and cut into ranges as over two data parallel ranks.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed.checkpoint as dcp

from benchmarks.harness import write_result
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.manifest import damaged_files, read_manifest
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.background import BackgroundSaver

HIDDEN, FFN = 1024, 4096
PARTS = ("weight", "fp32_param", "exp_avg", "exp_avg_sq")


# ---- the state ----


def global_state(num_bytes: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of as many feed-forward matrices as `num_bytes` hold."""
    count = max(1, num_bytes // (len(PARTS) * HIDDEN * FFN * 4))
    torch.manual_seed(0)
    return {f"{part}.{i}": torch.randn(FFN, HIDDEN) for i in range(count) for part in PARTS}


def shards(state: dict[str, torch.Tensor], tp: int, dp: int, axis: int = 0) -> dict[str, ShardedTensor]:
    """All shards of a layout, held here by one process: weights cut by `tp`, the rest flattened and cut by `dp`."""
    found: dict[str, ShardedTensor] = {}
    for key, whole in state.items():
        for t, part in enumerate(whole.chunk(tp, axis)):
            part = part.contiguous()
            if key.startswith("weight"):
                found[f"{key}.{t}"] = ShardedTensor.from_rank_offsets(key, part, (axis, t, tp))
                continue
            flat = part.reshape(-1)
            for d in range(dp):
                span = slice(flat.numel() * d // dp, flat.numel() * (d + 1) // dp)
                found[f"{key}.{t}.{d}"] = ShardedTensor.from_rank_offsets_flat(
                    key, flat[span], tuple(part.shape), (axis, t, tp), flattened_range=span
                )
    return found


# ---- measuring ----


@dataclass
class Timings:
    """Wall and CPU seconds of one thing, round by round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def row(self, num_bytes: int) -> dict[str, float]:
        wall, cpu = statistics.median(self.wall), statistics.median(self.cpu)
        return {
            "seconds": round(wall, 3),
            "GB_per_second": round(num_bytes / 1e9 / wall, 3),
            "best_GB_per_second": round(num_bytes / 1e9 / min(self.wall), 3),
            "GB_per_cpu_second": round(num_bytes / 1e9 / max(cpu, 1e-9), 3),
        }


def cpu_seconds() -> float:
    """User and system time of this process and of those that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


class Bench:
    """Takes the times of named actions."""

    def __init__(self) -> None:
        self.timings: dict[str, Timings] = {}

    def time(self, name: str, action: Callable[[], Any]) -> None:
        """Run an action once more."""
        timings = self.timings.setdefault(name, Timings())
        cpu, wall = cpu_seconds(), time.perf_counter()
        action()
        timings.wall.append(time.perf_counter() - wall)
        timings.cpu.append(cpu_seconds() - cpu)


def read_through(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    return folder


# ---- the contenders ----


def save_with_torch(state: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def save_with_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def save_with_dd(source: Path, target: Path) -> None:
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)


def one_round(bench: Bench, state: dict[str, torch.Tensor], folder: Path, source: Path, saver: BackgroundSaver) -> None:
    """Every contender once."""
    layout = shards(state, tp=2, dp=2)
    dd, plain, own = empty(folder / "dd"), empty(folder / "plain"), empty(folder / "torch_dist")
    safe, background, distributed = empty(folder / "safe"), empty(folder / "background"), empty(folder / "dcp")
    bench.time("save: dd conv=fsync", lambda: save_with_dd(source, dd / "file"))
    bench.time("save: torch_dist", lambda: dist_checkpointing.save(layout, own))
    bench.time("save: safetensors format", lambda: dist_checkpointing.save(layout, safe, ("safetensors", 1)))
    bench.time("save: torch.save", lambda: save_with_torch(state, plain / "file.pt"))
    bench.time("save: safetensors package", lambda: save_with_safetensors(state, plain / "file.safetensors"))
    bench.time("save: DCP", lambda: dcp.save(state, checkpoint_id=distributed, no_dist=True))
    queue = AsyncCallsQueue()

    def stall() -> None:
        request = dist_checkpointing.save(layout, background, async_sharded_save=True, background_saver=saver)
        assert request is not None
        queue.schedule_async_request(request)

    bench.time("async: stall", stall)
    bench.time("async: rest", lambda: queue.maybe_finalize_async_calls(blocking=True))

    target = {key: torch.empty_like(value).fill_(0) for key, value in state.items()}  # its pages exist
    same, whole, other = (shards(target, tp, dp, axis) for tp, dp, axis in ((2, 2, 0), (1, 1, 0), (4, 3, 1)))
    for name in (own, safe, plain, distributed):
        read_through(name)
    bench.time("load: torch_dist, same layout", lambda: dist_checkpointing.load(same, own))
    bench.time("load: torch_dist, into TP1 DP1", lambda: dist_checkpointing.load(whole, own))
    bench.time("load: torch_dist, into TP4 DP3 on the other axis", lambda: dist_checkpointing.load(other, own))
    bench.time("load: safetensors format", lambda: dist_checkpointing.load(same, safe))
    bench.time("verify: torch_dist", lambda: verify(own))
    bench.time("load: torch.load", lambda: torch.load(plain / "file.pt", weights_only=True))
    bench.time("load: safetensors package", lambda: load_with_safetensors(plain / "file.safetensors", target))
    bench.time("load: DCP", lambda: dcp.load(target, checkpoint_id=distributed, no_dist=True))


def verify(directory: Path) -> None:
    records = read_manifest(directory)
    assert records is not None and damaged_files(directory, records) == []


def load_with_safetensors(path: Path, target: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    for key, value in load_file(path).items():  # mapped: nothing is read before the copy
        target[key].copy_(value)


# ---- the report ----


def ratios(rows: dict[str, dict[str, float]], bench: Bench) -> dict[str, float]:
    """The claims."""
    save, same = rows["save: torch_dist"], rows["load: torch_dist, same layout"]
    to_disk = [d / s for d, s in zip(bench.timings["save: dd conv=fsync"].wall, bench.timings["save: torch_dist"].wall)]
    stalls = bench.timings["async: stall"].wall
    later = [s / w for s, w in zip(stalls[1:], bench.timings["save: torch_dist"].wall[1:])]
    reshard = [
        rows[f"load: torch_dist, into {name}"]["seconds"] / same["seconds"]
        for name in ("TP1 DP1", "TP4 DP3 on the other axis")
    ]
    both = 1 / (1 / same["GB_per_cpu_second"] + 1 / rows["verify: torch_dist"]["GB_per_cpu_second"])
    return {
        "save, of the disk's speed (median of the rounds)": round(statistics.median(to_disk), 3),
        "save, GB per CPU second": save["GB_per_cpu_second"],
        "load, GB per CPU second": same["GB_per_cpu_second"],
        "verify and load, GB per CPU second": round(both, 3),
        "first async stall, of a synchronous save": round(stalls[0] / bench.timings["save: torch_dist"].wall[0], 3),
        "later async stalls, of a synchronous save": round(statistics.median(later), 3) if later else 0.0,
        "resharding load, of a load in the same layout": round(max(reshard), 3),
    }


def main() -> None:
    """Print the table and the claims, and write them down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.folder))
    state = global_state(int(args.gib * 2**30))
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    source = folder / "source"  # what dd reads: in the page cache, and not zeros
    with open(source, "wb") as file:
        for tensor in state.values():
            file.write(memoryview(tensor.numpy()).cast("B"))
    bench, saver = Bench(), BackgroundSaver(persistent=True)
    saver.prepare(int(num_bytes * 1.05))  # as the training program does when it starts
    load = [os.getloadavg()[0]]
    try:
        for _ in range(args.rounds):
            one_round(bench, state, folder, source, saver)
            load.append(os.getloadavg()[0])
    finally:
        saver.close()
        shutil.rmtree(folder, ignore_errors=True)
    rows = {name: timings.row(num_bytes) for name, timings in bench.timings.items()}
    claims = ratios(rows, bench)
    for name, row in rows.items():
        speeds = f"{row['GB_per_second']:7.2f} GB/s {row['GB_per_cpu_second']:7.2f} GB/CPU-s"
        print(f"{name:52s} {row['seconds']:8.2f} s {speeds}")
    for name, value in claims.items():
        print(f"{name:52s} {value}")
    if args.output:
        loads = [round(value, 1) for value in load]
        settings = {"load_average_by_round": loads, "bytes": num_bytes, "rounds": args.rounds}
        write_result(args.output, **settings, claims=claims, rows=rows)


if __name__ == "__main__":
    main()
