"""A persistent pool of worker processes for tests that need several ranks.

Importing torch costs seconds, a process group milliseconds: the workers are started once for a test session
(forked from a server that has imported torch and this library) and get a fresh gloo group for every test.

    def check_sum(size: int) -> float: ...          # module level; runs on every rank
    results = run_ranks(4, check_sum, 4)            # the returned values, by rank
"""

from __future__ import annotations

import atexit
import gc
import itertools
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_HOST = "127.0.0.1"
_GRACE_SECONDS = 20.0  # how long the other ranks may take to finish after one has failed
_TIMEOUT_SECONDS = 600.0  # only a rank that hangs takes as long, on however slow or loaded a machine


class RankFailure(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = _TIMEOUT_SECONDS) -> list[Any]:
    """Run `fn(*args)` on `world_size` ranks joined by gloo; the values they return, by rank.

    torch.distributed is initialised with a default group of exactly these ranks, RANK, WORLD_SIZE and
    LOCAL_RANK are set. Afterwards all groups and the model-parallel state are destroyed.

    Raises:
        RankFailure: a rank raised or died, or `timeout` seconds have passed.
    """
    return _pool().run(world_size, fn, args, timeout)


class _Worker:
    def __init__(self, context: Any, python_path: list[str]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, python_path), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class WorkerPool:
    """Workers by rank; started when first needed, replaced when a test left them in a bad state."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.preloaded"])
        self.store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        self.workers: list[_Worker] = []
        self.tests = itertools.count()

    def run(self, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        while len(self.workers) < world_size:
            self.workers.append(_Worker(self.context, list(sys.path)))
        workers = self.workers[:world_size]
        prefix = f"test{next(self.tests)}"
        for rank, worker in enumerate(workers):
            worker.pipe.send((fn, args, rank, world_size, self.store.port, prefix, timeout))
        answers = self._collect(workers, timeout)
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failed or len(answers) < world_size:
            self._replace(workers)
            silent = [rank for rank in range(world_size) if rank not in answers]
            message = "".join(f"\n--- rank {rank} of {world_size} ---\n{text}" for rank, text in failed.items())
            if silent:
                message += f"\nranks {silent} had not finished" + ("" if failed else f" after {timeout:g} s")
            raise RankFailure(message)
        return [answers[rank][1] for rank in range(world_size)]

    def _collect(self, workers: list[_Worker], timeout: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank; stops early when a rank has failed and the others do not follow."""
        ranks: dict[Connection, int] = {worker.pipe: rank for rank, worker in enumerate(workers)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while ranks and time.monotonic() < deadline:
            for pipe in wait(list(ranks), timeout=min(1.0, max(0.0, deadline - time.monotonic()))):
                rank = ranks.pop(pipe)  # type: ignore[index]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    code = workers[rank].process.exitcode
                    answers[rank] = (False, f"the process died (exit code {code})")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return answers

    def _replace(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.kill()
            self.workers.remove(worker)

    def close(self) -> None:
        """Stop all workers."""
        self._replace(list(self.workers))


_the_pool: WorkerPool | None = None


def _pool() -> WorkerPool:
    global _the_pool
    if _the_pool is None:
        _the_pool = WorkerPool()
        atexit.register(_the_pool.close)
    return _the_pool


def _serve(pipe: Connection, python_path: list[str]) -> None:
    """A worker's life: run the tests that come through the pipe."""
    sys.path[:] = python_path
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    from torch.distributed import TCPStore

    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # no test cuts the power, and a busy disk takes its time
    store: TCPStore | None = None  # one connection for all tests: making it may wait 5 s for a name server
    while True:
        try:
            fn, args, rank, world_size, port, prefix, timeout = pipe.recv()
        except EOFError:
            return
        gc.freeze()  # modules stay: the collection after each test need not walk over them (0.3 s a rank)
        try:
            store = store or TCPStore(_HOST, port, is_master=False, wait_for_workers=False)
            answer: tuple[bool, Any] = (True, _run_one(fn, args, rank, world_size, store, prefix, timeout))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception as error:  # the result cannot be pickled
            pipe.send((False, f"rank {rank}: result cannot be sent: {error!r}"))


def _run_one(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    base_store: TCPStore,
    prefix: str,
    timeout: float,
) -> Any:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=_HOST,
        MASTER_PORT=str(base_store.port),
    )
    store = dist.PrefixStore(prefix, base_store)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout + _GRACE_SECONDS),
    )
    torch.manual_seed(1234)
    try:
        result = fn(*args)
        # Leave together: others may still be building connections to a rank that is already done.
        if store.add("finished", 1) < world_size:
            store.wait(["over"])
        return result
    finally:
        store.set("over", "")  # after a failure the others need not wait, either
        _forget_everything()


def _forget_everything() -> None:
    """Undo what tests set process-wide. A gloo group keeps threads: without this they pile up."""
    import torch
    import torch.distributed as dist

    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    microbatches = sys.modules.get("megatron.core.num_microbatches_calculator")
    if microbatches is not None:
        microbatches.destroy_num_microbatches_calculator()
    initialization = sys.modules.get("megatron.core.tensor_parallel.initialization")
    if initialization is not None:
        initialization.set_initialization_seed(None)
    global_vars = sys.modules.get("megatron.training.global_vars")
    if global_vars is not None:
        global_vars.destroy_global_vars()
    if torch.are_deterministic_algorithms_enabled():  # the call costs seconds of imports
        torch.use_deterministic_algorithms(False)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
