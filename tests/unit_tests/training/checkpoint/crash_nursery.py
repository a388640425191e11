"""Training runs that save all the time, to be killed at any instant; imports happen once for all of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.checkpoint.paths import TRACKER_FNAME
from megatron.training.checkpointing import checkpoint_exists
from tests.unit_tests.training.checkpoint.tiny_run import Plan, TinyRun

NO_LIMIT = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Habit:
    """How a run saves."""

    plan: Plan
    background: bool = False
    persistent: bool = False
    limit: int | None = None
    """Largest file that may be written, in bytes: what a full disk does to a write, without the disk."""
    die_before: str | None = None
    """Every rank kills itself in its second save, before an operation like this (regular expression of what and where)
    on files of the folder."""
    die_at: int = 1
    """Before which of such operations."""
    survivor: int | None = None
    """The rank that does not, which then loses the others."""

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "async_save": self.background,
            "use_persistent_ckpt_worker": self.persistent,
            "save_keep_last": 2,
        }


def digest(run: TinyRun) -> str:
    """Of everything that training goes on from: weights, moments, schedule, generators."""
    found = hashlib.sha256()
    optimizer = run.optimizer.optimizer if hasattr(run.optimizer, "optimizer") else run.optimizer
    tensors = [*run.weights().values(), torch.get_rng_state()]
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            tensors += [param.detach(), *(state[name] for name in sorted(state) if torch.is_tensor(state[name]))]
    for tensor in tensors:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found.update(repr((run.scheduler.num_steps, run.state)).encode())
    return found.hexdigest()


def uninterrupted(plan: Plan, steps: int) -> list[str]:
    """Digest after 0, 1, 2, ... steps, on this rank."""
    run = TinyRun(plan)
    found = [""]  # before the first step the optimizer has no state
    for _ in range(steps):
        run.train(1)
        found.append(digest(run))
    return found


def continued(plan: Plan, folder: str, flags: dict[str, Any]) -> tuple[int, str, str]:
    """(iteration that is loaded, its digest, the digest one step later), on this rank."""
    run = TinyRun(plan, seed=1000)
    with contextlib.redirect_stdout(io.StringIO()):
        run.load(folder, **flags)
    loaded = run.state.iteration, digest(run)
    run.train(1)
    return (*loaded, digest(run))


FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""What the interpreter reports to audit hooks; `os.open` is `open` there, `os.replace` is `os.rename`."""


def die_before_operation(what: str, number: int, folder: str) -> None:
    """Let this process end as if killed, just before its operation `number` (from 1) of a kind on files there."""
    left = [number]

    def count(event: str, values: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and folder in str(values[0]) and re.search(what, f"{event} {values[0]}"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def save_for_ever(habit: Habit, folder: str, rank: int, store: str) -> None:
    """Train a step and save, until somebody ends this."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(habit.plan.size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, habit.plan.size),
        rank=rank,
        world_size=habit.plan.size,
        timeout=timedelta(seconds=300),
    )
    run = TinyRun(habit.plan)
    with contextlib.redirect_stdout(io.StringIO()):
        if checkpoint_exists(folder):
            run.load(folder)
        if habit.limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (habit.limit, NO_LIMIT))
        while True:
            run.train(1)
            if habit.die_before is not None and run.state.iteration > 1:
                run.checkpoints.finish(blocking=True)
                if run.state.iteration > 2:
                    os._exit(0)
                if rank != habit.survivor:
                    die_before_operation(habit.die_before, habit.die_at, folder)
            try:
                run.save(folder, **habit.flags)
            except CheckpointingException:  # there was no room for it
                resource.setrlimit(resource.RLIMIT_FSIZE, (NO_LIMIT, NO_LIMIT))


def nurse(pipe: Connection) -> None:
    """For each (habit, folder, store) fork the ranks, answer their ids, and wait until all of them have ended."""
    while (job := pipe.recv()) is not None:
        habit, folder, store = job
        children = []
        for rank in range(habit.plan.size):
            child = os.fork()
            if child == 0:
                try:
                    with open(os.devnull, "w") as silence:
                        os.dup2(silence.fileno(), 2)
                    save_for_ever(habit, folder, rank, store)
                finally:
                    os._exit(1)
            children.append(child)
        pipe.send(children)
        for child in children:
            os.waitpid(child, 0)
        pipe.send("ended")


class Nursery:
    """Starts runs and kills them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=nurse, args=(theirs,), daemon=True)
        self.process.start()
        self.rounds = 0

    def run_and_kill(
        self, habit: Habit, folder: Path, victims: list[int], later_than: int, delay: float
    ) -> tuple[int, bool]:
        """Let a run save until the tracker names an iteration later than `later_than`, and for `delay` seconds more;
        then kill the `victims`, and the other ranks when they have had a second to notice.

        Returns (the iteration that the tracker names, whether the run made progress at all).
        """
        self.rounds += 1
        self.pipe.send((habit, str(folder), str(folder.parent / f"store{self.rounds}")))
        ranks = self.pipe.recv()
        deadline = time.monotonic() + 600
        while latest_iteration(folder) <= later_than and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        for victim in victims:
            os.kill(ranks[victim], signal.SIGKILL)
        if len(victims) < len(ranks):
            time.sleep(0.3)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        assert self.pipe.recv() == "ended"
        latest = latest_iteration(folder)
        return latest, latest > later_than

    def run_and_wait(self, habit: Habit, folder: Path) -> int:
        """Let a run save until it has killed itself; the iteration that the tracker names then."""
        self.rounds += 1
        self.pipe.send((habit, str(folder), str(folder.parent / f"store{self.rounds}")))
        self.pipe.recv()
        assert self.pipe.recv() == "ended"
        return latest_iteration(folder)

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(300)


def latest_iteration(folder: Path) -> int:
    """The iteration that the tracker names; 0 without a tracker."""
    tracker = folder / TRACKER_FNAME
    try:
        return int(tracker.read_text())
    except FileNotFoundError:
        return 0
