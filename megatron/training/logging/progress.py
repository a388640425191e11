"""A line that shows where a run is, rewritten in place on a terminal."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Shows iteration, loss, tokens per second and time left on stderr; silent unless that is a terminal."""

    def __init__(self, enabled: bool, total: int) -> None:
        self.enabled = enabled and sys.stderr.isatty()
        self.total = total
        self._begin: tuple[int, float] | None = None
        self._last_shown = 0.0

    def show(self, iteration: int, losses: dict[str, float], tokens_per_iteration: int) -> None:
        """Rewrite the line, at most ten times a second."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = (iteration, now)
        if not self.enabled or now - self._last_shown < 0.1:
            return
        self._last_shown = now
        done, seconds = iteration - self._begin[0], now - self._begin[1]
        speed = done / seconds if seconds and done else 0.0
        left = f"{(self.total - iteration) / speed / 60:.1f} min left" if speed else "…"
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        text = f"{iteration}/{self.total} | {shown} | {speed * tokens_per_iteration:,.0f} tokens/s | {left}"
        sys.stderr.write(f"\r\033[K{text[:150]}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Make room for an ordinary line."""
        if self.enabled:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
