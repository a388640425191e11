"""How far preprocessing is."""

from __future__ import annotations

import time
from typing import TextIO

from megatron.training.datasets.encoding import EncodedBlock


class Progress:
    """Says how far the work is: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, num_bytes: int, log_interval: int, stream: TextIO) -> None:
        self.num_bytes = num_bytes
        self.log_interval = log_interval
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.start = time.monotonic()
        self.num_documents = 0
        self.num_bytes_encoded = 0
        self._next_documents = log_interval
        self._next_time = self.start

    def add(self, block: EncodedBlock, num_bytes_read: int) -> None:
        """Count a finished block; `num_bytes_read` of the input files are read by now."""
        self.num_documents += block.num_documents
        self.num_bytes_encoded += block.num_bytes
        now = time.monotonic()
        if self.is_terminal and now >= self._next_time:
            self._next_time = now + 0.2
            share = num_bytes_read / self.num_bytes if self.num_bytes else 0.0  # a pipe has no size
            left = (now - self.start) * (1 - share) / share if share else 0.0
            rest = f" {share:4.0%}, {_minutes(left)} left" if share else ""
            self.stream.write(f"\r{self._state()}{rest} \x1b[K")
            self.stream.flush()
        elif not self.is_terminal and self.num_documents >= self._next_documents:
            self._next_documents = (self.num_documents // self.log_interval + 1) * self.log_interval
            print(self._state(), file=self.stream, flush=True)

    def finish(self) -> None:
        """Say the final numbers."""
        print(f"\r{self._state()}\x1b[K" if self.is_terminal else self._state(), file=self.stream, flush=True)

    def _state(self) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        return (
            f"Processed {self.num_documents} documents ({self.num_documents / elapsed:.1f} docs/s, "
            f"{self.num_bytes_encoded / elapsed / 1e6:.2f} MB/s)."
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
