"""Schedules that fill idle time with weight gradients. P ranks, M microbatches.

F forward, I gradient of the input, W gradient of the weights.
"""

from __future__ import annotations

from megatron.core.pipeline_parallel.schedule import Compute, Forward, InputGrad, Kind, Order, WeightGrad
from megatron.core.stage_placement import Placement


def zero_bubble_h1(num_ranks: int, num_microbatches: int) -> list[Order]:
    """1F1B in which rank p postpones weight gradients by p microbatches (arXiv:2401.10241, section 2.2).

    The ranks behind hand their input gradients on that much earlier, and fill the drain with what they postponed:
    the bubble is a third of 1F1B's, for the memory of its first rank on every rank.
    """
    return [_postponing_rank(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]


def _postponing_rank(rank: int, num_ranks: int, num_microbatches: int) -> Order:
    warmup = min(num_ranks - 1 - rank, num_microbatches)
    order: Order = [Forward(i) for i in range(warmup)]
    for i in range(num_microbatches):
        if i + warmup < num_microbatches:
            order.append(Forward(i + warmup))
        order.append(InputGrad(i))
        if i >= rank:
            order.append(WeightGrad(i - rank))
    return order + [WeightGrad(i) for i in range(max(0, num_microbatches - rank), num_microbatches)]


def zero_bubble_v(num_ranks: int, num_microbatches: int) -> list[Order]:
    """Two chunks on each rank, placed in a V (arXiv:2405.15362, section 4.2).

    With parts of equal length, and microbatches as many as ranks or at least twice as many less one, only the P - 1
    half stages remain idle in which the first microbatch reaches the last rank.
    """
    if num_microbatches >= 2 * num_ranks - 1:
        return [_phases_of_v(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    return _first_come_in_v(num_ranks, num_microbatches)


class _Turns:
    """Appends to an order what is next of a kind on a chunk, as long as there is something."""

    def __init__(self, num_microbatches: int) -> None:
        self.order: Order = []
        self.num_microbatches = num_microbatches
        self.done = dict.fromkeys(((kind, chunk) for kind in Kind for chunk in range(2)), 0)

    def take(self, kind: Kind, chunk: int) -> bool:
        """Whether there was something: every kind needs the one before it."""
        before = {Kind.INPUT_GRAD: Kind.FORWARD, Kind.WEIGHT_GRAD: Kind.INPUT_GRAD}.get(kind)
        available = self.num_microbatches if before is None else self.done[before, chunk]
        microbatch = self.done[kind, chunk]
        if microbatch >= available:
            return False
        self.order.append(Compute(kind, microbatch, chunk))
        self.done[kind, chunk] += 1
        return True


def _phases_of_v(rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """Rank by rank in phases: until the first microbatch returns, until its gradients do, steady, drain."""
    turns = _Turns(num_microbatches)
    take, done = turns.take, turns.done
    f, i, w = Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD
    for _ in range(2 * (num_ranks - rank) - 1):
        take(f, 0)
    for _ in range(rank):
        take(f, 1)
        take(f, 0)
    for _ in range(num_ranks - rank):
        for kind in (f, i, w):
            take(kind, 1)
    while min(done[f, 0], done[f, 1]) < num_microbatches:
        for chunk in (0, 1):
            take(f, chunk)
            if take(i, chunk):
                take(w, chunk)
    for _ in range(rank):
        take(i, 0)
        take(i, 1)
    for _ in range(num_ranks - rank):
        take(i, 0)
        take(w, 0)
    for chunk in (1, 0):
        while take(w, chunk):
            pass
    return turns.order


_PREFERENCES = (
    (Kind.INPUT_GRAD, 0),
    (Kind.INPUT_GRAD, 1),
    (Kind.FORWARD, 1),
    (Kind.FORWARD, 0),
    (Kind.WEIGHT_GRAD, 1),
    (Kind.WEIGHT_GRAD, 0),
)


def _first_come_in_v(num_ranks: int, num_microbatches: int) -> list[Order]:
    """For few microbatches: at each unit of time every rank computes the first of the preferences that has its
    inputs."""
    placement = Placement(num_ranks, 2, "v")
    ranks = [_Turns(num_microbatches) for _ in range(num_ranks)]
    ended: dict[tuple[Kind, int, int], int] = {}
    now, remaining = 0, num_ranks * num_microbatches * 6
    while remaining:
        chosen = [_choose(turns, rank, placement, ended, now) for rank, turns in enumerate(ranks)]
        now += 1
        for rank, compute in enumerate(chosen):
            if compute is not None:
                ended[compute.kind, compute.microbatch, placement.stage_of(rank, compute.chunk)] = now
        progress = num_ranks - chosen.count(None)
        assert progress, "ranks wait for each other"
        remaining -= progress
    return [turns.order for turns in ranks]


def _choose(
    turns: _Turns, rank: int, placement: Placement, ended: dict[tuple[Kind, int, int], int], now: int
) -> Compute | None:
    alive = sum(turns.done[Kind.FORWARD, chunk] - turns.done[Kind.WEIGHT_GRAD, chunk] for chunk in range(2))
    for kind, chunk in _PREFERENCES:
        if kind is Kind.FORWARD and alive >= 2 * placement.num_ranks:
            continue
        stage = placement.stage_of(rank, chunk)
        needed = _input_of(kind, turns.done[kind, chunk], stage, placement.num_stages)
        if (needed is None or ended.get(needed, now + 1) <= now) and turns.take(kind, chunk):
            return turns.order[-1]
    return None


def _input_of(kind: Kind, microbatch: int, stage: int, num_stages: int) -> tuple[Kind, int, int] | None:
    """The computation that a computation waits for, None for the first."""
    if kind is Kind.WEIGHT_GRAD:
        return Kind.INPUT_GRAD, microbatch, stage
    if kind is Kind.INPUT_GRAD:
        return (kind, microbatch, stage + 1) if stage + 1 < num_stages else (Kind.FORWARD, microbatch, stage)
    return (kind, microbatch, stage - 1) if stage else None
