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
from torch.distributed import ProcessGroup

from megatron.core.activity import activity, current_activities, interrupted_by
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups

ROLES = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "pp": "pipeline",
    "dp": "data parallel",
    "ep": "expert parallel",
    "dp_cp": "data and context parallel",
    "intra_dp_cp": "data and context parallel",
    "mp": "tensor and pipeline parallel",
    "tp_cp": "tensor and context parallel",
    "embd": "tied embedding's",
    "pos_embd": "position embedding's",
    "expt_dp": "expert data parallel",
}
"""What the ranks of a group are called; of two that have the same ranks, the first."""


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
    group = one.group
    assert group is not None
    ranks = tuple(dist.get_process_group_ranks(group))
    me = dist.get_rank()
    of = f" of {one.details['of']}" if one.details.get("of") else ""
    if one.peer is None:
        what = f"{one.name}{of} over {_role(group)} {spoken(ranks)}"
        on = tuple(rank for rank in ranks if rank != me)
    else:
        peer = ranks[one.peer]
        link = "to" if one.name == "send" else "from"
        what = f"{one.name}{of} {link} rank {peer}, in {_role(group)} {spoken(ranks)}"
        on = (peer,) if peer != me else tuple(rank for rank in ranks if rank != me)
    return Wait(what, on, ranks, time.perf_counter() - one.started, is_over)


def _role(group: ProcessGroup) -> str:
    if group is dist.group.WORLD:
        return "all"
    if has_default_process_groups():
        groups = default_process_groups()
        for name, role in ROLES.items():
            if getattr(groups, name) is group:
                return f"the {role}"
    return "the"


def spoken(ranks: tuple[int, ...] | list[int]) -> str:
    """`rank 3`, `ranks 0 and 2`, `ranks 0, 1 and 2`, or, of many, `ranks 0, 1, 2, … 63 (64 of them)`."""
    words = [str(rank) for rank in ranks]
    if len(words) == 1:
        return f"rank {words[0]}"
    if len(words) > 8:
        return f"ranks {', '.join(words[:3])}, … {words[-1]} ({len(words)} of them)"
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"


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
