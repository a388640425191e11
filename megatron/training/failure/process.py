"""What the failure watch needs of the process that it watches: what it is doing, its voice and its end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from megatron.training.failure.state import RankState, Wait, longest_wait, main_stack, present_state


class ThisProcess:
    """The process that runs this; a test puts a made-up one in its place."""

    def state(self, error: BaseException | None = None) -> RankState:
        """What it is doing, or was doing when `error` ended it."""
        return present_state(error)

    def longest_wait(self) -> Wait | None:
        """The communication that it is in."""
        return longest_wait()

    def stack(self) -> str:
        """The Python stack of its main thread."""
        return main_stack()

    def write(self, text: str) -> None:
        """Say `text` on standard error."""
        write(text)

    def end(self, status: int, text: str, before: Callable[[], None] = lambda: None) -> NoReturn:
        """Say `text`, do `before`, end at once."""
        end_process(status, text, before)


def write(text: str) -> None:
    """Print to standard error in one piece, so that ranks do not interleave; nothing if there is nothing."""
    if text:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os.write(2, text.encode(errors="replace"))


_ending = threading.Lock()

farewells: list[Callable[[], None]] = []
"""What a program does before this process ends because of a failure, here or elsewhere; each takes seconds at most."""


def end_process(status: int, text: str, before: Callable[[], None] = lambda: None) -> NoReturn:
    """Print `text`, say the farewells, end this process and its helpers. An orderly end would wait for ranks that have
    gone.

    The first thread that comes here decides; others wait for the end.
    """
    _ending.acquire()
    try:
        write(text)
        for child in multiprocessing.active_children():
            child.kill()
        for farewell in farewells:
            farewell()
        before()
    except BaseException:
        write(traceback.format_exc())
    finally:
        os._exit(status)
