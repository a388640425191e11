"""Notes that the scheduler asked the job to end, so that it can save first."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron.core import device
from megatron.core.collectives import all_reduce


class SignalHandler:
    """Remembers that SIGTERM arrived instead of dying of it."""

    def __init__(self, watched: signal.Signals = signal.SIGTERM) -> None:
        self.received = False
        self._watched = watched
        self._before = signal.signal(watched, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def received_anywhere(self) -> bool:
        """Whether it arrived on any rank. Communicates: all-reduce."""
        flag = torch.tensor(int(self.received), device=device.current_device())
        all_reduce(flag, dist.ReduceOp.MAX, what="signals")
        return bool(flag.item())

    def release(self) -> None:
        """Give the signal back to whoever handled it before."""
        signal.signal(self._watched, self._before)
