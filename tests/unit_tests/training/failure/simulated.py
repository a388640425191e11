"""A run of several ranks inside one test: the real hub and watches on real sockets, in time that passes when all wait.

Threads take turns. One runs until it waits in the clock; then the next whose wait is over does. When nobody's is,
the time moves on to the earliest deadline. So what happens is the same on any machine, and minutes cost milliseconds.
"""

from __future__ import annotations

import selectors
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron.training.failure.clock import Clock
from megatron.training.failure.hub import Hub
from megatron.training.failure.line_channel import LineChannel
from megatron.training.failure.process import ThisProcess
from megatron.training.failure.state import RankState, Wait
from megatron.training.failure.verdict import Member
from megatron.training.failure.watch import FailureWatch

NEVER = float("inf")


class Over(BaseException):
    """Ends the threads of a rank that has ended."""


@dataclass(eq=False)
class Task:
    """A thread that runs only when it is its turn."""

    work: Callable[[], None]
    owner: Rank | None = None
    is_ready: Callable[[], object] = lambda: True
    deadline: float = 0.0
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_over: bool = False
    error: BaseException | None = None

    def can_go(self) -> bool:
        """Whether its wait is over; not while its process is frozen."""
        return not (self.owner and self.owner.is_frozen) and bool(
            (self.owner and self.owner.is_dead) or self.is_ready()
        )


class FakeClock(Clock):
    """Time that passes only while all tasks wait."""

    def __init__(self) -> None:
        self.time = 0.0
        self.tasks: list[Task] = []
        self._current: Task | None = None
        self._back = threading.Semaphore(0)

    # --- what the watch calls ---

    def now(self) -> float:
        return self.time

    def select(self, selector: selectors.BaseSelector, seconds: float) -> list[tuple[selectors.SelectorKey, int]]:
        self.block(lambda: selector.select(0), seconds)
        return selector.select(0)

    def wait_for(self, event: threading.Event, seconds: float) -> bool:
        self.block(event.is_set, seconds)
        return event.is_set()

    def join(self, thread: Any, seconds: float) -> None:
        self.block(lambda: thread.is_over, seconds)

    def sleep(self, seconds: float) -> None:
        self.block(lambda: False, seconds)

    # --- turns ---

    def block(self, is_ready: Callable[[], object], seconds: float = NEVER) -> None:
        """End the turn of the task that calls this, until `is_ready()` or for so long."""
        task = self._current
        assert task is not None, "only a task waits"
        task.is_ready, task.deadline = is_ready, self.time + max(0.0, seconds)
        self._back.release()
        task.turn.acquire()
        if task.owner is not None and task.owner.is_dead:
            raise Over

    def start(self, work: Callable[[], None], owner: Rank | None = None) -> Task:
        """Have `work` done in a task of its own."""
        task = Task(work, owner)
        self.tasks.append(task)
        threading.Thread(target=self._run, args=(task,), daemon=True).start()
        return task

    def _run(self, task: Task) -> None:
        task.turn.acquire()
        try:
            task.work()
        except Over:
            pass
        except BaseException as error:  # for the test to see
            task.error = error
        task.is_over = True
        self._back.release()

    def run(self, most_seconds: float = 600.0) -> None:
        """Let all tasks have their turns until they are over; those of frozen ranks stay as they are."""
        while todo := [task for task in self.tasks if not task.is_over and not (task.owner and task.owner.is_frozen)]:
            task = next((task for task in todo if task.can_go()), None)
            if task is None:
                task = min(todo, key=lambda one: one.deadline)
                assert task.deadline <= most_seconds, f"still waiting after {most_seconds} s"
                self.time = max(self.time, task.deadline)
            self._current = task
            task.turn.release()
            self._back.acquire()
            if task.error is not None:
                raise task.error


class Rank(ThisProcess):
    """A rank of a simulated run, as its watch sees it."""

    def __init__(self, run: SimulatedRun, rank: int) -> None:
        self.run, self.rank = run, rank
        self.is_dead = self.is_frozen = False
        self.code: int | None = None
        self.said = ""
        self.ended_at = NEVER
        self.at = "model.py:7 in forward"
        self._wait: tuple[str, tuple[int, ...], tuple[int, ...], float] | None = None
        self._is_ending = False
        self.sockets: list[socket.socket] = []
        self.watch: FailureWatch | None = None

    # --- what the watch asks ---

    def state(self, error: BaseException | None = None) -> RankState:
        wait = self.longest_wait()
        if wait is not None and error is not None:
            wait = Wait(wait.what, wait.on, wait.group, wait.seconds, is_over=True)
        return RankState(wait, self.at)

    def longest_wait(self) -> Wait | None:
        if self._wait is None:
            return None
        what, on, group, since = self._wait
        return Wait(what, on, group, self.run.clock.now() - since)

    def stack(self) -> str:
        return f"  {self.at}\n"

    def write(self, text: str) -> None:
        self.said += text

    def end(self, status: int, text: str, before: Callable[[], None] = lambda: None) -> NoReturn:
        if self._is_ending:  # another thread of this rank is at it
            self.run.clock.block(lambda: False)
        self._is_ending = True
        self.write(text)
        before()
        self.die(status)
        raise Over

    # --- what its program does ---

    def die(self, code: int) -> None:
        """End without a word; the kernel closes what is open."""
        self.is_dead, self.code, self.ended_at = True, code, self.run.clock.now()
        for one in self.sockets:
            one.close()
        if self.rank == 0 and self.run.hub is not None:
            self.run.hub.forget_in_child()

    def freeze(self) -> None:
        """Do nothing any more, and stay."""
        self.is_frozen = True
        self.run.clock.block(lambda: False)

    def terminate(self) -> None:
        """Get a SIGTERM."""
        assert self.watch is not None
        self.watch._signals[1].send(bytes([signal.SIGTERM]))

    def communicate(self, what: str, *group: int, on: tuple[int, ...] = ()) -> None:
        """Be in a communication with `group` for ever, or until the connection to one of them breaks."""
        needed = on or tuple(other for other in group if other != self.rank)
        self._wait = what, needed, group, self.run.clock.now()
        others = [self.run.ranks[other] for other in group if other != self.rank]
        self.run.clock.block(lambda: any(other.is_dead for other in others), self.run.transport_timeout)
        if any(other.is_dead for other in others):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting for recv operation to complete")

    def compute(self, at: str, seconds: float = NEVER) -> None:
        """Be busy."""
        self._wait, self.at = None, at
        self.run.clock.block(lambda: False, seconds)


@dataclass
class SimulatedRun:
    """The ranks of a run, after it."""

    clock: FakeClock
    ranks: list[Rank]
    transport_timeout: float
    hub: Hub | None = None

    def program(self, rank: Rank, scenario: Callable[[Rank], None]) -> None:
        """What a program does around its work."""
        assert rank.watch is not None
        try:
            scenario(rank)
        except Exception as error:
            rank.watch.note(error)
            text = f"[rank {rank.rank}] {type(error).__name__}: {error}\n"
            rank.watch.fail(error, text)
        rank.watch.stop()
        rank.die(0)


def simulate(
    world_size: int, scenario: Callable[[Rank], None], timeout: float = 60.0, transport_timeout: float = NEVER
) -> SimulatedRun:
    """Let each rank do `scenario(rank)` below its watch until all have ended, but for frozen ones.

    Args:
        timeout: seconds that a communication may take before the watch complains.
        transport_timeout: the same, before it breaks by itself.
    """
    clock = FakeClock()
    run = SimulatedRun(clock, [], transport_timeout)
    run.ranks += [Rank(run, rank) for rank in range(world_size)]
    members = [Member(rank, 100 + rank, "here") for rank in range(world_size)]
    with _server() as (server, address):
        run.hub = Hub(server, "token", world_size, clock)
        served = run.hub, clock.start(run.hub.run, run.ranks[0])
        for rank in run.ranks:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(address)
            channel, member = LineChannel(connection), members[rank.rank]
            channel.send({"kind": "hello", "token": "token", "rank": rank.rank, "pid": member.pid, "host": member.host})
            hub: Any = served if rank.rank == 0 else None
            rank.watch = FailureWatch(rank.rank, members[0], channel, timeout, hub, process=rank, clock=clock)
            rank.sockets = [connection, *rank.watch._signals]
        for rank in run.ranks:
            clock.start(rank.watch.run, rank)  # type: ignore[union-attr]
            clock.start(lambda rank=rank: run.program(rank, scenario), rank)  # type: ignore[misc]
        try:
            clock.run()
        finally:
            for rank in run.ranks:
                if not rank.is_dead:
                    rank.die(-9)
    return run


@contextmanager
def _server() -> Iterator[tuple[socket.socket, str]]:
    """A server whose messages are there when they are sent, as they are not always over TCP."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        address = str(Path(folder) / "s")
        server.bind(address)
        server.listen(64)
        yield server, address
