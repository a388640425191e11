"""When each computation of a pipeline starts and ends, if computations and transfers take given times.

Transfers overlap with computation and never wait for each other: this is the schedule's own bubble, not that of a
slow network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.core.pipeline_parallel.schedule import Compute, Kind, Order
from megatron.core.stage_placement import Placement


class Durations(Protocol):
    """How long everything takes, in any unit."""

    @property
    def transfer(self) -> float:
        """From the end of a computation to the earliest begin of one on another rank that needs its result."""

    def work(self, compute: Compute, stage: int) -> float:
        """Time of one computation on a virtual stage."""

    def gap(self, compute: Compute, stage: int) -> float:
        """How long its rank does something else between the computation before and this one."""


@dataclass(frozen=True)
class Costs:
    """Time of each computation, in any unit: one number, or one for each virtual stage."""

    forward: float | Sequence[float] = 1.0
    input_grad: float | Sequence[float] = 1.0
    weight_grad: float | Sequence[float] = 1.0
    transfer: float = 0.0
    """From one rank to another."""

    def work(self, compute: Compute, stage: int) -> float:
        """Time of one computation: that of its kind on this stage, whichever the microbatch."""
        return self.of(compute.kind, stage)

    def gap(self, compute: Compute, stage: int) -> float:
        """Ranks do nothing else."""
        return 0.0

    def of(self, kind: Kind, stage: int) -> float:
        """Time of one computation on a virtual stage; a whole backward is the sum of its two parts."""
        match kind:
            case Kind.FORWARD:
                return _at(self.forward, stage)
            case Kind.INPUT_GRAD:
                return _at(self.input_grad, stage)
            case Kind.WEIGHT_GRAD:
                return _at(self.weight_grad, stage)
            case Kind.BACKWARD:
                return _at(self.input_grad, stage) + _at(self.weight_grad, stage)


def _at(cost: float | Sequence[float], stage: int) -> float:
    return float(cost if isinstance(cost, (int, float)) else cost[stage])


@dataclass(frozen=True)
class Span:
    """One computation on the time axis."""

    rank: int
    compute: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of each rank, in order."""

    ranks: list[list[Span]]
    makespan: float = field(init=False)
    """End of the last computation; the first starts at 0."""
    bubble_fraction: float = field(init=False)
    """Share of `makespan` during which ranks are idle, averaged over the ranks."""

    def __post_init__(self) -> None:
        makespan = max((span.end for spans in self.ranks for span in spans), default=0.0)
        busy = sum(span.end - span.start for spans in self.ranks for span in spans)
        object.__setattr__(self, "makespan", makespan)
        idle = 1.0 - busy / (makespan * len(self.ranks)) if makespan else 0.0
        object.__setattr__(self, "bubble_fraction", idle)


def planned_timeline(orders: list[Order], placement: Placement, costs: Durations | None = None) -> Timeline:
    """Start and end of every computation, each as early as its rank and its inputs allow.

    Args:
        orders: what each rank computes, in order.
        costs: unit times by default (forward 1, backward 2 in two equal parts, transfers 0).

    Raises:
        RuntimeError: the ranks wait for each other forever.
    """
    costs = costs or Costs()
    ends: dict[tuple[Kind, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in orders]
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            row = spans[rank]
            while len(row) < len(order):
                compute = order[len(row)]
                ready = _inputs_ready(compute, rank, placement, costs, ends)
                if ready is None:
                    break
                stage = placement.stage_of(rank, compute.chunk)
                start = max(ready, row[-1].end + costs.gap(compute, stage) if row else 0.0)
                row.append(Span(rank, compute, start, start + costs.work(compute, stage)))
                ends[compute.kind, compute.microbatch, stage] = row[-1].end
                progress = True
    stuck = {rank: order[len(row)] for rank, (order, row) in enumerate(zip(orders, spans)) if len(row) < len(order)}
    if stuck:
        raise RuntimeError(f"the schedule does not complete: ranks wait forever at {stuck}")
    return Timeline(spans)


def _inputs_ready(
    compute: Compute, rank: int, placement: Placement, costs: Durations, ends: dict[tuple[Kind, int, int], float]
) -> float | None:
    """When the last input of a computation is there; None if it is not known yet."""
    microbatch, stage = compute.microbatch, placement.stage_of(rank, compute.chunk)
    if compute.kind is Kind.WEIGHT_GRAD:
        return ends.get((Kind.INPUT_GRAD, microbatch, stage))
    if compute.kind is Kind.FORWARD:
        sources: tuple[Kind, ...] = (Kind.FORWARD,)
        source = stage - 1
    else:
        sources, source = (Kind.BACKWARD, Kind.INPUT_GRAD), stage + 1
        if (Kind.FORWARD, microbatch, stage) not in ends:
            return None
    if not 0 <= source < placement.num_stages:
        return 0.0
    travel = 0.0 if placement.holder_of(source).rank == rank else costs.transfer
    found = [ends[kind, microbatch, source] for kind in sources if (kind, microbatch, source) in ends]
    return found[0] + travel if found else None
