"""Named stopwatches of a rank, compared across ranks when they are read."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device
from megatron.core.activity import communicating
from megatron.core.collectives import all_gather_into_tensor


class TimerBase(ABC):
    """What a timer can do."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def start(self, barrier: bool = False) -> None:
        """Begin measuring; with `barrier` after all ranks have arrived."""

    @abstractmethod
    def stop(self, barrier: bool = False) -> None:
        """End measuring and add to what was measured before."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was measured."""

    @abstractmethod
    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Seconds measured, including the present stretch if the timer runs."""


class DummyTimer(TimerBase):
    """The timer of a level that is switched off."""

    def __init__(self) -> None:
        super().__init__("dummy timer")

    def start(self, barrier: bool = False) -> None:
        """Nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Refuse: there is no number to give."""
        raise RuntimeError("this timer is switched off; raise --timing-log-level")


class Timer(TimerBase):
    """A stopwatch that waits for the device before it reads the clock."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._elapsed = 0.0
        self._active_time = 0.0
        self._started: float | None = None

    @property
    def running(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._started is not None

    def start(self, barrier: bool = False) -> None:
        """Begin measuring.

        Raises:
            RuntimeError: it runs already.
        """
        if self._started is not None:
            raise RuntimeError(f"timer {self.name!r} has already been started")
        self._started = self._now(barrier)

    def stop(self, barrier: bool = False) -> None:
        """End measuring.

        Raises:
            RuntimeError: it does not run.
        """
        if self._started is None:
            raise RuntimeError(f"timer {self.name!r} is not started")
        stretch = self._now(barrier) - self._started
        self._elapsed += stretch
        self._active_time += stretch
        self._started = None

    def reset(self) -> None:
        """Forget what was measured; the time since the program began stays in `active_time`."""
        self._elapsed = 0.0
        self._started = None

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Seconds measured; a running timer goes on running."""
        running = self.running
        if running:
            self.stop(barrier)
        seconds = self._elapsed
        if reset:
            self.reset()
        if running:
            self.start(barrier)
        return seconds

    def active_time(self) -> float:
        """Seconds measured since the timer exists, resets or not."""
        return self._active_time

    @staticmethod
    def _now(barrier: bool) -> float:
        if barrier and dist.is_initialized():
            with communicating("barrier", None):
                dist.barrier()
        device.synchronize()
        return time.perf_counter()


class Timers:
    """Timers by name; those above `log_level` do nothing.

    Args:
        log_option: what to print: `max`, `minmax` across ranks, or `all` ranks.
    """

    def __init__(self, log_level: int, log_option: str) -> None:
        if log_option not in ("max", "minmax", "all"):
            raise ValueError(f"timing log option {log_option!r} is not one of max, minmax, all")
        self._log_level = log_level
        self._log_option = log_option
        self._timers: dict[str, Timer] = {}
        self._log_levels: dict[str, int] = {}
        self._dummy = DummyTimer()
        self._max_log_level = 2

    def __call__(self, name: str, log_level: int | None = None) -> TimerBase:
        """The timer `name`, made at `log_level` (2 if not said) when first asked for.

        Raises:
            ValueError: the level is not 0..2, or differs from the one the timer was made with.
        """
        if name in self._timers:
            known = self._log_levels[name]
            if log_level is not None and log_level != known:
                raise ValueError(f"timer {name!r} has level {known}, not {log_level}")
            return self._timers[name]
        level = self._max_log_level if log_level is None else log_level
        if not 0 <= level <= self._max_log_level:
            raise ValueError(f"timer level {level} is not one of 0, 1, 2")
        if level > self._log_level:
            return self._dummy
        self._timers[name] = Timer(name)
        self._log_levels[name] = level
        return self._timers[name]

    def _seconds_of_all_ranks(self, names: list[str], reset: bool, barrier: bool) -> Tensor:
        """[ranks, names] seconds; 0 where a rank has no such timer. Communicates: all-gather."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if barrier and ranks > 1:
            with communicating("barrier", None):
                dist.barrier()
        mine = torch.zeros(len(names), dtype=torch.float32, device=device.current_device())
        for i, name in enumerate(names):
            if name in self._timers:
                mine[i] = self._timers[name].elapsed(reset=reset)
        if ranks == 1:
            return mine.unsqueeze(0).cpu()
        gathered = mine.new_empty(ranks * len(names))
        all_gather_into_tensor(gathered, mine)
        return gathered.view(ranks, len(names)).cpu()

    def get_all_timers_string(
        self,
        names: list[str] | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> str | None:
        """The report of the timers, milliseconds divided by `normalizer`; None if there is nothing to report."""
        names = list(self._timers) if names is None else names
        if not names:
            return None
        millis = self._seconds_of_all_ranks(names, reset, barrier) * 1000.0 / normalizer
        columns = [(name, millis[:, i]) for i, name in enumerate(names) if bool((millis[:, i] > 0).any())]
        if not columns:
            return None
        if self._log_option == "all":
            lines = ["times across ranks (ms):"]
            for name, column in columns:
                lines.append(f"  {name}:")
                lines += [f"     rank {r:2d}: {v:.2f}" for r, v in enumerate(column.tolist()) if v > 0]
            return "\n".join(lines)
        lines = ["max time across ranks (ms):" if self._log_option == "max" else "(min, max) time across ranks (ms):"]
        for name, column in columns:
            measured = column[column > 0]
            low, high = float(measured.min()), float(measured.max())
            text = f"{high:.2f}" if self._log_option == "max" else f"({low:.2f}, {high:.2f})"
            lines.append(f"    {(name + ' ').ljust(48, '.')}: {text}")
        return "\n".join(lines)

    def log(
        self,
        names: list[str] | None,
        rank: int | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> str | None:
        """The report on rank `rank` (the last if None), None elsewhere. All ranks must call, the caller prints."""
        report = self.get_all_timers_string(names, normalizer, reset, barrier)
        here = dist.get_rank() if dist.is_initialized() else 0
        last = dist.get_world_size() - 1 if dist.is_initialized() else 0
        return report if here == (last if rank is None else rank) else None

    def write(
        self,
        names: list[str],
        writer: Any,
        iteration: int,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> None:
        """Write `<name>-time`, the maximum over ranks in seconds divided by `normalizer`, to a TensorBoard writer."""
        seconds = self._seconds_of_all_ranks(names, reset, barrier) / normalizer
        if writer is not None:
            for i, name in enumerate(names):
                if name in self._timers:
                    writer.add_scalar(f"{name}-time", float(seconds[:, i].max()), iteration)


@contextmanager
def timed(config: Any, name: str, log_level: int = 2) -> Iterator[None]:
    """Measure what happens inside with the timer `name` of `config.timers`, if the config has timers.

    Level-1 timers start behind a barrier if `config.barrier_with_L1_time`. An exception leaves the timer running.
    """
    if config.timers is None:
        yield
        return
    timer = config.timers(name, log_level=log_level)
    timer.start(barrier=log_level == 1 and config.barrier_with_L1_time)
    yield
    timer.stop()
