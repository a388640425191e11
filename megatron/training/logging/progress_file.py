"""progress.txt: one line for every start of a job and every checkpoint, across all jobs that continue one another."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

_FORMAT = "%Y-%m-%d %H:%M:%S"


def _append(args: Any, text: str) -> None:
    folder = Path(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    job = os.getenv("SLURM_JOB_ID", "")
    stamp = f"{datetime.datetime.now():{_FORMAT}}"
    with open(folder / "progress.txt", "a", encoding="utf-8") as file:
        file.write(f"{stamp}\tJob ID: {job}\t# GPUs: {args.world_size}\t{text}\n")


def append_start(args: Any) -> None:
    """Note that a job has started."""
    _append(args, "Starting job")


def append_saved(run: Any, event: str) -> None:
    """Note a checkpoint with the throughput of this job and of all jobs of this size so far."""
    args, state = run.args, run.state
    flops = state.num_floating_point_operations_so_far
    job = (flops - run.flops_at_start) / ((time.time() - run.started) * 1e12 * args.world_size)
    start_time, start_flops = _first_start(args)
    seconds = max((datetime.datetime.now() - start_time).total_seconds(), 1e-9)
    cumulative = (flops - start_flops) / (seconds * 1e12 * args.world_size)
    tokens = state.consumed_train_samples * args.seq_length / 1e9
    _append(
        args,
        f"{event}\tIteration: {state.iteration}\tJob throughput: {job:.1f} TFLOP/s/GPU\t"
        f"Cumulative throughput: {cumulative:.1f} TFLOP/s/GPU\tFloating-point operations: {flops:.2e}\t"
        f"Tokens (in billions): {tokens:.2f}",
    )


def append_finished(args: Any, iteration: int) -> None:
    """Note that a checkpoint written in the background is complete."""
    _append(args, f"Saved async checkpoint\tIteration: {iteration}")


def _first_start(args: Any) -> tuple[datetime.datetime, float]:
    """When the first of the latest consecutive jobs of this world size started, and the operations done before."""
    start: tuple[datetime.datetime, float] | None = None
    flops, world = 0.0, None
    with open(Path(args.save) / "progress.txt", encoding="utf-8") as file:
        for line in file:
            fields = line.rstrip("\n").split("\t")
            size = int(fields[2].split(": ")[1])
            if size != world:
                world, start = size, None
            if fields[3] == "Saved checkpoint":
                flops = float(fields[7].split(": ")[1])
            if size == args.world_size and start is None and fields[3] == "Starting job":
                start = (datetime.datetime.strptime(fields[0], _FORMAT), flops)
    return start or (datetime.datetime.now(), flops)
