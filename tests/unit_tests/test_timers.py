"""Stopwatches with a clock that the tests turn, on one rank and on several."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from megatron.core.timers import Timer, Timers, timed
from tests.worker_pool import run_ranks


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch("megatron.core.timers.time.perf_counter", clock):
        yield clock


def measure(timers: Timers, clock: Clock, **seconds: float) -> None:
    for name, value in seconds.items():
        timers(name.replace("_", "-"), log_level=0).start()
        clock.now += value
        timers(name.replace("_", "-")).stop()


def test_stretches_add_up_until_they_are_read(clock: Clock) -> None:
    timer = Timer("t")
    for seconds in (2.0, 3.5):
        timer.start()
        clock.now += seconds
        timer.stop()
        clock.now += 50
    assert timer.elapsed(reset=False) == 5.5
    assert timer.elapsed() == 5.5
    assert timer.elapsed() == 0.0
    assert timer.active_time() == 5.5


def test_reading_does_not_stop_a_running_timer(clock: Clock) -> None:
    timer = Timer("t")
    timer.start()
    clock.now += 2
    assert timer.elapsed(reset=False) == 2.0
    assert timer.running
    clock.now += 3
    assert timer.elapsed() == 5.0
    clock.now += 1
    assert timer.elapsed() == 1.0
    timer.stop()
    assert timer.active_time() == 6.0


def test_start_and_stop_must_alternate() -> None:
    timer = Timer("forward")
    with pytest.raises(RuntimeError, match="'forward' is not started"):
        timer.stop()
    timer.start()
    with pytest.raises(RuntimeError, match="'forward' has already been started"):
        timer.start()
    timer.reset()
    timer.start()


def test_timers_above_the_level_do_nothing() -> None:
    timers = Timers(log_level=1, log_option="max")
    timers("always", log_level=0).start()
    timers("one", log_level=1).start()
    for name, level in (("two", 2), ("no level said", None)):
        timer = timers(name, log_level=level)
        timer.start()
        timer.start()  # a switched-off timer has no state to confuse
        timer.stop()
        timer.reset()
        with pytest.raises(RuntimeError, match="switched off; raise --timing-log-level"):
            timer.elapsed()
    assert sorted(timers._timers) == ["always", "one"]
    assert timers("one") is timers("one", log_level=1)


def test_levels_and_options_are_checked() -> None:
    with pytest.raises(ValueError, match="'mean' is not one of max, minmax, all"):
        Timers(log_level=0, log_option="mean")
    timers = Timers(log_level=2, log_option="max")
    timers("step", log_level=1)
    with pytest.raises(ValueError, match="'step' has level 1, not 2"):
        timers("step", log_level=2)
    for level in (3, -1):
        with pytest.raises(ValueError, match=f"timer level {level} is not one of 0, 1, 2"):
            timers("other", log_level=level)


@pytest.mark.parametrize(
    ("option", "report"),
    [
        (
            "minmax",
            "(min, max) time across ranks (ms):\n"
            "    forward-backward ...............................: (125.00, 125.00)\n"
            "    optimizer ......................................: (31.25, 31.25)",
        ),
        (
            "max",
            "max time across ranks (ms):\n"
            "    forward-backward ...............................: 125.00\n"
            "    optimizer ......................................: 31.25",
        ),
        (
            "all",
            "times across ranks (ms):\n  forward-backward:\n     rank  0: 125.00\n  optimizer:\n     rank  0: 31.25",
        ),
    ],
)
def test_report_of_one_rank(clock: Clock, option: str, report: str) -> None:
    timers = Timers(log_level=0, log_option=option)
    measure(timers, clock, forward_backward=0.5, optimizer=0.125, unused=0.0)
    names = ["forward-backward", "never-made", "unused", "optimizer"]
    assert timers.get_all_timers_string(names, normalizer=4, reset=False) == report
    assert timers.log(names, normalizer=4) == report
    assert timers.log(names) is None  # the first reading has reset them


def test_report_of_all_names_is_the_default(clock: Clock) -> None:
    timers = Timers(log_level=0, log_option="max")
    assert timers.log(None) is None
    measure(timers, clock, b=1.0, a=2.0)
    report = timers.log(None)
    assert report is not None
    assert [line.split()[0] for line in report.splitlines()[1:]] == ["b", "a"]


def reports_of_rank(option: str) -> list[str | None]:
    """`all` takes 1, 2, 3 seconds on ranks 0, 1, 2; `some` runs on rank 1 only."""
    rank, clock = dist.get_rank(), Clock()
    timers = Timers(log_level=2, log_option=option)
    with mock.patch("megatron.core.timers.time.perf_counter", clock):
        measure(timers, clock, all=rank + 1.0)
        if rank == 1:
            measure(timers, clock, some=0.5)
        names = ["all", "some"]
        return [timers.log(names, reset=False), timers.log(names, rank=0, barrier=True)]


def test_report_of_several_ranks() -> None:
    def dotted(name: str) -> str:
        return f"    {name} {'.' * (47 - len(name))}: "

    minmax = "\n".join(
        [
            "(min, max) time across ranks (ms):",
            dotted("all") + "(1000.00, 3000.00)",
            dotted("some") + "(500.00, 500.00)",
        ]
    )
    assert run_ranks(3, reports_of_rank, "minmax") == [[None, minmax], [None, None], [minmax, None]]
    by_rank = "\n".join(
        ["times across ranks (ms):", "  all:"]
        + [f"     rank {rank:2d}: {rank + 1}000.00" for rank in range(3)]
        + ["  some:", "     rank  1: 500.00"]
    )
    assert run_ranks(3, reports_of_rank, "all")[2][0] == by_rank


def test_measuring_a_block(clock: Clock) -> None:
    timers = Timers(log_level=1, log_option="max")
    config = SimpleNamespace(timers=timers, barrier_with_L1_time=True)
    for _ in range(2):
        with timed(config, "step", log_level=1), timed(config, "detail"):
            clock.now += 3
    assert timers("step").elapsed() == 6.0
    assert list(timers._timers) == ["step"]  # details are switched off
    with timed(SimpleNamespace(timers=None), "step"):
        pass


class Writer:
    """Takes scalars like a TensorBoard writer."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self.scalars.append((name, value, iteration))


def written_by_rank() -> list[tuple[str, float, int]]:
    clock, writer = Clock(), Writer()
    timers = Timers(log_level=2, log_option="max")
    with mock.patch("megatron.core.timers.time.perf_counter", clock):
        measure(timers, clock, step=dist.get_rank() + 1.0)
        last = dist.get_rank() == dist.get_world_size() - 1
        timers.write(["step", "missing"], writer if last else None, 7, normalizer=4)
        timers.write(["step"], writer if last else None, 8)
    return writer.scalars


def test_scalars_are_the_slowest_rank_in_seconds() -> None:
    assert run_ranks(2, written_by_rank) == [[], [("step-time", 0.5, 7), ("step-time", 0.0, 8)]]


def waiting_time(barrier: bool) -> float:
    """Of a rank, on a clock that strikes one when rank 1 has done its work."""
    store = dist.distributed_c10d._get_default_store()
    timer = Timer("t")
    with mock.patch("megatron.core.timers.time.perf_counter", lambda: float(store.check(["done"]))):
        timer.start(barrier=barrier)
        if dist.get_rank() == 0:
            store.set("rank 0 has started", "")
        else:
            store.wait(["rank 0 has started" if barrier else "rank 0 has stopped"])
            store.set("done", "")
        timer.stop(barrier=barrier)
        if dist.get_rank() == 0:
            store.set("rank 0 has stopped", "")
        return timer.elapsed()


def test_with_a_barrier_every_rank_measures_the_slowest() -> None:
    assert run_ranks(2, waiting_time, True) == [1.0, 1.0]
    assert run_ranks(2, waiting_time, False) == [0.0, 1.0]
