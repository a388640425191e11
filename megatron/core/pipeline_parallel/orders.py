"""The order in which each rank computes, schedule by schedule. P ranks, V chunks on each, M microbatches.

| schedule | paper | live microbatches (chunk inputs) of rank p at most |
|---|---|---|
| gpipe | arXiv:1811.06965 | M |
| 1f1b | PipeDream-Flush, arXiv:2006.09503 | P - p |
| interleaved | arXiv:2104.04473, section 2.2 | 2 (P - p - 1) + (V - 1) N + 1, N the microbatches per turn of a chunk |
| zb-h1 | arXiv:2401.10241, section 2.2 | P |
| zb-v | arXiv:2405.15362 | 2 P chunks, of half a rank's layers each |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron.core.pipeline_parallel.schedule import (
    Backward,
    Compute,
    Forward,
    InputGrad,
    Kind,
    Order,
    WeightGrad,
)
from megatron.core.pipeline_parallel.zero_bubble import zero_bubble_h1, zero_bubble_v
from megatron.core.stage_placement import Placement, placement_shape

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


@dataclass(frozen=True)
class ScheduleRequest:
    """Everything that a schedule depends on."""

    name: ScheduleName
    num_ranks: int
    num_microbatches: int
    num_chunks: int = 1
    group_size: int | None = None
    """Interleaved: microbatches that run on one chunk before the next chunk's turn; None is the number of ranks."""
    is_forward_only: bool = False
    splits_backward: bool = False
    """Compute gradients of weights apart, right after the gradient of the input has been sent."""

    @property
    def placement(self) -> Placement:
        """Which rank holds which virtual stage."""
        return Placement(self.num_ranks, self.num_chunks, placement_shape(self.name))

    @property
    def turn(self) -> int:
        """Microbatches that run on one chunk before the next chunk's turn."""
        return self.num_ranks if self.group_size is None else self.group_size


def compute_orders(request: ScheduleRequest) -> list[Order]:
    """What each rank computes, in order."""
    if request.is_forward_only:
        return [list(forward_only(request)) for _ in range(request.num_ranks)]
    orders = ORDERS[request.name](request)
    return [split_backward(order) for order in orders] if request.splits_backward else orders


def predicted_peaks(request: ScheduleRequest) -> list[int]:
    """For each rank the largest number of (microbatch, chunk) whose activations are alive at once, by formula."""
    ranks, total = range(request.num_ranks), request.num_microbatches * request.num_chunks
    if request.is_forward_only:
        return [1 for _ in ranks]
    match request.name:
        case "gpipe":
            return [total for _ in ranks]
        case "1f1b":
            return [min(total, request.num_ranks - rank) for rank in ranks]
        case "interleaved":
            return [min(total, num_warmup(request, rank) + 1) for rank in ranks]
        case "zb-h1":
            return [min(total, request.num_ranks) for _ in ranks]
        case "zb-v":
            return [min(total, 2 * request.num_ranks) for _ in ranks]


def forward_only(request: ScheduleRequest) -> Iterator[Compute]:
    """Evaluation: each microbatch as far as it goes."""
    for microbatch in range(request.num_microbatches):
        for chunk in range(request.num_chunks):
            yield Forward(microbatch, chunk)


def gpipe(request: ScheduleRequest) -> list[Order]:
    """All forwards, then all backwards."""
    microbatches = range(request.num_microbatches)
    return [[*map(Forward, microbatches), *map(Backward, microbatches)] for _ in range(request.num_ranks)]


def one_forward_one_backward(request: ScheduleRequest) -> list[Order]:
    """As many forwards as there are ranks behind, then a forward and a backward in turn."""
    return [list(_one_by_one(request.num_ranks - 1 - rank, request)) for rank in range(request.num_ranks)]


def _one_by_one(warmup: int, request: ScheduleRequest) -> Iterator[Compute]:
    forward = [Forward(microbatch, chunk) for microbatch, chunk in chunk_turns(request)]
    backward = [Backward(microbatch, request.num_chunks - 1 - chunk) for microbatch, chunk in chunk_turns(request)]
    warmup = min(warmup, len(forward))
    for i in range(len(forward) + warmup):
        if i < len(forward):
            yield forward[i]
        if i >= warmup:
            yield backward[i - warmup]


def chunk_turns(request: ScheduleRequest) -> list[tuple[int, int]]:
    """(microbatch, chunk) in the order of forward: `turn` microbatches on one chunk, the same on the next, ..."""
    return [
        (microbatch, chunk)
        for first in range(0, request.num_microbatches, request.turn)
        for chunk in range(request.num_chunks)
        for microbatch in range(first, min(first + request.turn, request.num_microbatches))
    ]


def num_warmup(request: ScheduleRequest, rank: int) -> int:
    """Forwards of an interleaved schedule before its first backward (arXiv:2104.04473, figure 4)."""
    enough = 2 * (request.num_ranks - 1 - rank) + (request.num_chunks - 1) * request.turn
    return min(enough, request.num_microbatches * request.num_chunks)


def interleaved(request: ScheduleRequest) -> list[Order]:
    """One forward and one backward in turn, the chunks taking turns."""
    return [list(_one_by_one(num_warmup(request, rank), request)) for rank in range(request.num_ranks)]


def split_backward(order: Order) -> Order:
    """Each backward in two parts, one right after the other: the stage before waits for the first only."""
    result: Order = []
    for compute in order:
        if compute.kind is Kind.BACKWARD:
            result += [InputGrad(compute.microbatch, compute.chunk), WeightGrad(compute.microbatch, compute.chunk)]
        else:
            result.append(compute)
    return result


ORDERS: dict[str, Callable[[ScheduleRequest], list[Order]]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": lambda request: zero_bubble_h1(request.num_ranks, request.num_microbatches),
    "zb-v": lambda request: zero_bubble_v(request.num_ranks, request.num_microbatches),
}
"""A schedule's name -> the order of each rank."""
