"""Who is to blame when ranks wait in vain: a pure function of what all of them are doing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.training.activity_names import spoken
from megatron.training.failure.state import RankState


@dataclass(frozen=True)
class Member:
    """A process of the run."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class Verdict:
    """Why all ranks stop."""

    ranks: tuple[int, ...]
    """Those to blame."""
    reason: str
    """One sentence without a full stop."""


def named(members: Mapping[int, Member], ranks: tuple[int, ...]) -> str:
    """`rank 2 (pid 7 on here)`, or several of them."""
    words = [str(members[rank]) if rank in members else f"rank {rank}" for rank in ranks[:4]]
    if len(ranks) > 4:
        words.append(f"{len(ranks) - 4} more")
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def judge(
    members: Mapping[int, Member],
    states: Mapping[int, RankState],
    complained: frozenset[int],
    left: frozenset[int] = frozenset(),
) -> Verdict:
    """The verdict when a rank has waited too long, or lost a connection, while no process died.

    Args:
        members: all ranks.
        states: what those that answered are doing.
        complained: the ranks that have waited in vain.
        left: ranks that have ended in good order.
    """
    silent = tuple(sorted(members.keys() - states.keys() - left))
    if silent:
        return Verdict(silent, f"{named(members, silent)} does not answer: frozen, or its machine is gone")
    needed = _needed_by(complained, states)
    gone = tuple(sorted(needed & left))
    if gone:
        return Verdict(gone, f"{named(members, gone)} ended while others still waited for it")
    absent = tuple(rank for rank in sorted(needed & states.keys()) if states[rank].wait is None)
    if absent:
        places = "; ".join(f"rank {rank} is at {states[rank].at}" for rank in absent[:4])
        return Verdict(absent, f"{named(members, absent)} did not come: {places}")
    involved = tuple(sorted((needed | complained) & states.keys()))
    whats = {wait.what for rank in involved if (wait := states[rank].wait)}
    if len(whats) == 1:
        return Verdict(involved, f"{whats.pop()} broke off although all of them are alive and in it: a network fault")
    return Verdict(involved, f"{spoken(involved)} wait for each other: {_who_waits(involved, states)}")


def _needed_by(ranks: frozenset[int], states: Mapping[int, RankState]) -> set[int]:
    """The ranks that `ranks` wait for, those that these wait for, and so on."""
    found: set[int] = set()
    todo = list(ranks)
    while todo:
        state = states.get(todo.pop())
        new = set(state.wait.on) - found if state is not None and state.wait is not None else set()
        found |= new
        todo += new
    return found


def _who_waits(ranks: tuple[int, ...], states: Mapping[int, RankState]) -> str:
    by_wait: dict[str, list[int]] = {}
    for rank in ranks:
        wait = states[rank].wait
        if wait is not None:
            by_wait.setdefault(wait.what, []).append(rank)
    return "; ".join(f"{spoken(waiting)} in {what}" for what, waiting in by_wait.items())
