"""Rank 0 builds index files, the others wait for the files: by asking, not in a collective that would time out.

What ranks tell each other stands in the store of the default process group: how far rank 0 is, how many ranks have
finished, and the error of a rank that failed, which then is raised on all.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store

from megatron.core.datasets.index_cache import on_cache_miss

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REPORT_SECONDS = 10.0
_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 600.0  # rank 0 counts as dead; shuffling a billion documents keeps it silent for a minute
_LONGEST_PAUSE = 1.0


def run_rank_zero_first(work: Callable[[], T], runs_here: bool) -> T | None:
    """The result of `work` on ranks where `runs_here`, None elsewhere; indices that are missing are built by rank 0.

    All ranks run `work` at once. A rank other than 0 that finds no files of an index waits for them, with progress
    messages, and builds itself only if rank 0 ends without them (a disk that is not shared, no permission to write).
    Returns when all ranks have finished. Called by all ranks; without a process group, just runs `work`.

    Raises:
        RuntimeError: `work` failed on another rank; the rank where it failed raises its own error.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return work() if runs_here else None
    board = _Board()
    result, error = None, None
    try:
        with board.role(builds=runs_here):
            result = work() if runs_here else None
    except _BuilderFailed:
        pass  # its error is raised below
    except Exception as caught:  # told to all ranks, raised again below
        error = caught
        board.tell_failure(error)
    board.wait_for_all()
    if error is not None:
        raise error
    if failure := board.failure():
        raise RuntimeError(failure)
    return result


class _BuilderFailed(Exception):
    """Rank 0 told of an error while this rank waited for a file of its."""


class _Board:
    """What the ranks of one call of `run_rank_zero_first` know of each other."""

    def __init__(self) -> None:
        store: Store = torch.distributed.distributed_c10d._get_default_store()
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        # no rank starts the next call before all have started this one, so counting arrivals numbers the calls
        call = (store.add("index builds", 1) - 1) // self.world_size
        self._store = PrefixStore(f"index build {call}", store)

    @contextmanager
    def role(self, builds: bool) -> Iterator[None]:
        """Within the block rank 0 tells of what it builds, and the others wait for that."""
        if self.rank != 0:
            with on_cache_miss(self._wait_for_file):
                yield
            return
        ended = threading.Event()
        pulse = threading.Thread(target=self._show_life, args=(ended,), daemon=True)
        self._store.set("now", "opens its data" if builds else "")
        pulse.start()
        try:
            with on_cache_miss(self._tell_of_building):
                yield
        finally:
            ended.set()
            pulse.join()
            self._store.set("now", "")

    # -- rank 0 ----------------------------------------------------------------------------------------

    def _tell_of_building(self, path: str, _: Callable[[], T | None]) -> None:
        self._store.set("now", f"builds {path}")

    def _show_life(self, ended: threading.Event) -> None:
        while True:
            self._store.add("pulse", 1)
            if ended.wait(_BEAT_SECONDS):
                return

    # -- the others ------------------------------------------------------------------------------------

    def _wait_for_file(self, path: str, load: Callable[[], T | None]) -> T | None:
        pulse, heard = -1, time.monotonic()
        for _ in self._pauses(lambda: f"wait for {path}: rank 0 {self._now() or 'has not come this far'}"):
            over = self._now() == ""  # asked before looking, so that no file is missed
            if self.failure():
                raise _BuilderFailed
            if (found := load()) is not None or over:
                return found
            if (beat := self._store.add("pulse", 0)) != pulse:
                pulse, heard = beat, time.monotonic()
            elif pulse > 0 and time.monotonic() - heard > _SILENCE_SECONDS:
                raise RuntimeError(f"no sign of life from rank 0, which {self._now()}, for {_SILENCE_SECONDS:.0f} s")
        raise AssertionError  # pauses never end

    def _now(self) -> str | None:
        """What rank 0 does: "" nothing any more, None: nothing yet."""
        return self._store.get("now").decode() if self._store.check(["now"]) else None

    # -- all -------------------------------------------------------------------------------------------

    def tell_failure(self, error: Exception) -> None:
        """Let the others know of an error of this rank."""
        text = "".join(traceback.format_exception_only(error)).strip()
        self._store.set("failure", f"rank {self.rank} failed: {text}")

    def failure(self) -> str | None:
        """What a rank told of its error, if any did."""
        return self._store.get("failure").decode() if self._store.check(["failure"]) else None

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        finished = self._store.add("finished", 1)
        if finished == self.world_size:
            return

        def still_out() -> str:
            return f"wait for {self.world_size - finished} of {self.world_size} ranks to open their data"

        for _ in self._pauses(still_out):
            finished = self._store.add("finished", 0)
            if finished == self.world_size:
                return

    def _pauses(self, what: Callable[[], str]) -> Iterator[None]:
        """Endless turns with growing pauses between them; one rank says now and then what it waits for."""
        start = last = time.monotonic()
        pause, reports = 0.001, None
        while True:
            yield
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() - last >= _REPORT_SECONDS:
                last = time.monotonic()
                if reports is None:
                    reports = self._store.add("reporters", 1) == 1
                if reports:
                    logger.info("rank %d has %.0f s to %s", self.rank, last - start, what())
