"""Ranks in processes of their own, which may end as they like, unlike those of the worker pool."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.worker_pool import _pool


@dataclass
class End:
    """How a rank's process ended."""

    code: int | None
    """None if it had not."""
    said: str
    """What it printed, to both streams."""


def run_to_the_end(
    folder: Path, world_size: int, fn: Callable[..., None], *args: Any, timeout: float = 600, patience: float = 120
) -> list[End]:
    """Run `fn(*args)` on `world_size` fresh processes with a launcher's environment; none is alive afterwards.

    Args:
        folder: where what they print is kept.
        timeout: seconds after which all are killed.
        patience: the same, counted from the end of the first one.
    """
    _pool()  # its fork server has imported torch
    context = mp.get_context("forkserver")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(str(folder), list(sys.path), rank, world_size, port, fn, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        _wait_for(processes, timeout, patience)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [End(code, (folder / f"rank{rank}").read_text()) for rank, code in enumerate(codes)]


def _wait_for(processes: list[Any], timeout: float, patience: float) -> None:
    """Until all have ended, or have had time enough for it; a frozen one is not waited for."""
    deadline = time.monotonic() + timeout
    first_end = None
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        time.sleep(0.05)
        if len(alive) < len(processes) and first_end is None:
            first_end = time.monotonic()
            deadline = min(deadline, first_end + patience)
        if first_end is not None and all(_is_frozen(process.pid) for process in alive):
            return


def _is_frozen(pid: int) -> bool:
    """Whether a process was stopped by SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _rank(
    folder: str, path: list[str], rank: int, world_size: int, port: int, fn: Callable[..., None], args: tuple[Any, ...]
) -> None:
    sys.path[:] = path
    printed = os.open(f"{folder}/rank{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        fn(*args)
    except SystemExit:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
        raise
    sys.stdout.flush()
