"""The clock of the failure watch, and how its threads wait: what a test can put another time in the place of."""

from __future__ import annotations

import selectors
import threading
import time


class Clock:
    """Real time. Every wait of the watch goes through one of these methods."""

    def now(self) -> float:
        """Seconds from some fixed moment."""
        return time.monotonic()

    def select(self, selector: selectors.BaseSelector, seconds: float) -> list[tuple[selectors.SelectorKey, int]]:
        """Those that have something to read, or are closed, once there are any or `seconds` are over."""
        return selector.select(max(0.0, seconds))

    def wait_for(self, event: threading.Event, seconds: float) -> bool:
        """Whether `event` is set, as soon as it is or after `seconds`."""
        return event.wait(seconds)

    def join(self, thread: threading.Thread, seconds: float) -> None:
        """Wait for the end of a thread, at most `seconds`."""
        thread.join(timeout=seconds)

    def sleep(self, seconds: float) -> None:
        """Do nothing for so long."""
        time.sleep(seconds)


REAL = Clock()
