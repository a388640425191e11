"""What this rank is doing, as a value that travels: what it waits for and where its main thread stands."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
import traceback
from dataclasses import asdict, dataclass, fields
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron.core.activity import activity, current_activities, interrupted_by
from megatron.training.activity_names import in_words


@dataclass(frozen=True)
class Wait:
    """A communication that needs other ranks."""

    what: str
    """E.g. "all-reduce of gradients over the data parallel ranks 0 and 2"."""
    on: tuple[int, ...]
    """Global ranks that it needs, itself excluded."""
    group: tuple[int, ...]
    """All global ranks that take part."""
    seconds: float
    is_over: bool = False
    """It has ended in an error."""

    def __str__(self) -> str:
        return f"{self.what}, for {self.seconds:.1f} s"


@dataclass(frozen=True)
class RankState:
    """What a rank is doing."""

    wait: Wait | None
    at: str
    """Innermost line of the main thread that is not a library's."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RankState:
        """The state of which `to_json` made `values`."""
        wait = values["wait"]
        if wait is not None:
            known = {field.name: wait[field.name] for field in fields(Wait)}
            wait = Wait(**{**known, "on": tuple(wait["on"]), "group": tuple(wait["group"])})
        return cls(wait, values["at"])


def present_state(error: BaseException | None = None) -> RankState:
    """The state of this process now; of the communication that `error` has ended, if it has ended one."""
    ended = interrupted_by(error) if error is not None else None
    if ended is not None and ended.waits:
        wait: Wait | None = _describe(ended, is_over=True)
    else:
        wait = longest_wait()
    return RankState(wait, where(main_frame()) if error is None else where_raised(error))


def longest_wait() -> Wait | None:
    """The communication that this process is in; of several, in several threads, the one that began first."""
    waits = [one for one in current_activities() if one.waits]
    return _describe(waits[0]) if waits else None


def _describe(one: activity, is_over: bool = False) -> Wait:
    assert one.group is not None
    ranks = tuple(dist.get_process_group_ranks(one.group))
    others = tuple(rank for rank in ranks if rank != dist.get_rank())
    on = others if one.peer is None or ranks[one.peer] not in others else (ranks[one.peer],)
    return Wait(in_words(one), on, ranks, time.perf_counter() - one.started, is_over)


# --- where the main thread stands -----------------------------------------------------------------

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def main_frame() -> FrameType | None:
    """The innermost frame of the main thread."""
    main = threading.main_thread().ident
    return sys._current_frames().get(main) if main is not None else None


def where(frame: FrameType | None) -> str:
    """`folder/file.py:12 in function`: the innermost frame that is neither Python's nor an installed package's."""
    innermost = frame
    while frame is not None and frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen")):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "a place unknown"
    return _place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def where_raised(error: BaseException) -> str:
    """`folder/file.py:12 in function`: where `error` was raised, as far in as the code is not a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not one.filename.startswith((*_LIBRARIES, "<frozen"))] or frames
    return _place(own[-1].filename, own[-1].lineno or 0, own[-1].name) if own else "a place unknown"


def _place(file: str, line: int, function: str) -> str:
    shown = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
    return f"{shown}:{line} in {function}"


def main_stack() -> str:
    """The Python stack of the main thread."""
    frame = main_frame()
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
