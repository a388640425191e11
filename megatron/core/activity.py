"""What each thread of this process is doing now, and, while somebody listens, when each activity began and ended.

Code names what it does by a `with` around it. That costs under a microsecond, and another thread can read it: a rank
that waits for a dead one can so be asked for what. A listener sees every activity that ends: the timeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import ProcessGroup

    Listener = Callable[["activity", float], None]


class activity:
    """`with activity("forward", microbatch=3): ...` names what happens inside.

    Attributes:
        name: what is done, in the words of a message.
        group: the ranks that take part, where it is a communication.
        peer: the one rank of `group` that is waited for; None if all are.
        details: numbers that tell it from others of its name.
        started: `time.perf_counter()` when it began.
        cpu_started: `time.thread_time()` when it began, if somebody listened; else 0.
        is_flight: it is a communication from its launch to its end, beside what the thread does meanwhile (`launched`).
        outer: the activity of the same thread around it.
    """

    __slots__ = ("cpu_started", "details", "group", "is_flight", "name", "outer", "peer", "started")

    def __init__(
        self, name: str, *, group: ProcessGroup | None = None, peer: int | None = None, **details: Any
    ) -> None:
        self.name, self.group, self.peer, self.details = name, group, peer, details
        self.started = self.cpu_started = 0.0
        self.outer: activity | None = None
        self.is_flight = False

    @property
    def waits(self) -> bool:
        """Whether it needs other ranks to end."""
        return self.group is not None

    def __enter__(self) -> activity:
        thread = get_ident()
        self.outer = _now.get(thread)
        _now[thread] = self
        if _state.synchronize is not None:
            _state.synchronize()
        if _state.listener is not None:
            self.cpu_started = time.thread_time()
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if _state.listener is not None:
            if _state.synchronize is not None:
                _state.synchronize()
            _state.listener(self, time.perf_counter())
        if error is not None and _state.interrupted[0] != id(error):
            _state.interrupted = id(error), self
        if self.outer is None:
            _now.pop(get_ident(), None)
        else:
            _now[get_ident()] = self.outer

    def __repr__(self) -> str:
        return f"activity({self.name!r}, {self.details})"


@dataclass
class _State:
    listener: Listener | None = None
    synchronize: Callable[[], None] | None = None
    interrupted: tuple[int, activity | None] = (0, None)
    """Of the last exception its id, for the object would keep tensors alive, and the innermost activity it has left."""


_now: dict[int, activity] = {}
"""The innermost activity of each thread that is in one."""
_state = _State()


def communicating(
    name: str, group: ProcessGroup | None, peer: int | None = None, **details: Any
) -> AbstractContextManager[Any]:
    """The activity of exchanging something with the other ranks of `group`, or with its rank `peer` alone.

    Compiled code goes without: a compiler cannot see through it.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return activity(name, group=torch.distributed.group.WORLD if group is None else group, peer=peer, **details)


def launched(name: str, group: ProcessGroup | None, peer: int | None = None, **details: Any) -> Callable[[], None]:
    """Note that a communication is under way. What is returned is to be called when it is through, or has been waited
    for; further calls do nothing. A listener then hears of the whole flight, of which this thread sees its end alone.
    """
    if _state.listener is None or torch.compiler.is_compiling():
        return _unheard
    listeners = [_state.listener]
    flight = activity(name, group=torch.distributed.group.WORLD if group is None else group, peer=peer, **details)
    flight.is_flight, flight.started = True, time.perf_counter()

    def landed() -> None:
        while listeners:
            listeners.pop()(flight, time.perf_counter())

    return landed


def _unheard() -> None:
    """Nobody listened at the launch."""


def current_activities() -> list[activity]:
    """The innermost activity of each thread; of this process as a whole, the one that began last comes last."""
    return sorted(_now.copy().values(), key=lambda one: one.started)


def interrupted_by(error: BaseException) -> activity | None:
    """The innermost activity that `error`, or what caused it, has ended; None if it was raised outside of any."""
    cause: BaseException | None = error
    while cause is not None:
        if _state.interrupted[0] == id(cause):
            return _state.interrupted[1]
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def listening(listener: Listener, synchronize: Callable[[], None] | None = None) -> Iterator[None]:
    """Hand every activity that ends meanwhile to `listener(activity, perf_counter at its end)`.

    Args:
        synchronize: waits for the device; called before each reading of the clock, so that the times of an
            accelerator are those of the work and not of its launch. Nothing overlaps then.
    """
    before = _state.listener, _state.synchronize
    _state.listener, _state.synchronize = listener, synchronize
    try:
        yield
    finally:
        _state.listener, _state.synchronize = before
