"""Pipeline schedules as data: for each stage, the list of what it computes and what it exchanges, in order.

Nothing here needs a process. The executor runs these lists; `simulate` proves that every send meets its
receive and tells how many activations are alive at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum


class Direction(Enum):
    """Activations travel forward, their gradients backward."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True)
class Compute:
    """Forward or backward of one microbatch."""

    direction: Direction
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.direction.value}{self.microbatch}"


def Forward(microbatch: int) -> Compute:
    """Forward of a microbatch."""
    return Compute(Direction.FORWARD, microbatch)


def Backward(microbatch: int) -> Compute:
    """Backward of a microbatch."""
    return Compute(Direction.BACKWARD, microbatch)


@dataclass(frozen=True)
class Transfer:
    """Send or receive what one microbatch leaves at the border to stage `peer`."""

    is_send: bool
    direction: Direction
    microbatch: int
    peer: int


@dataclass(frozen=True)
class Exchange:
    """Transfers that are posted together; the stage goes on when all of them are done."""

    transfers: tuple[Transfer, ...]


Step = Compute | Exchange


def one_forward_one_backward(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Compute]:
    """Work of one stage in order (PipeDream-Flush, arXiv:2006.09503).

    At most `num_stages - stage` microbatches are alive.
    """
    warmup = min(num_stages - 1 - stage, num_microbatches)
    for i in range(num_microbatches + warmup):
        if i < num_microbatches:
            yield Forward(i)
        if i >= warmup:
            yield Backward(i - warmup)


def forward_only(num_microbatches: int) -> Iterator[Compute]:
    """Work of one stage in evaluation."""
    for microbatch in range(num_microbatches):
        yield Forward(microbatch)


def with_transfers(work: Iterable[Compute], stage: int, num_stages: int) -> list[Step]:
    """`work` with an exchange between any two computations: what the one sends and what the next needs."""
    steps: list[Step] = []
    outgoing: list[Transfer] = []
    for compute in work:
        exchange = outgoing + _needs(compute, stage, num_stages)
        if exchange:
            steps.append(Exchange(tuple(exchange)))
        steps.append(compute)
        outgoing = _gives(compute, stage, num_stages)
    if outgoing:
        steps.append(Exchange(tuple(outgoing)))
    return steps


def _needs(compute: Compute, stage: int, num_stages: int) -> list[Transfer]:
    peer = stage - 1 if compute.direction is Direction.FORWARD else stage + 1
    return [Transfer(False, compute.direction, compute.microbatch, peer)] if 0 <= peer < num_stages else []


def _gives(compute: Compute, stage: int, num_stages: int) -> list[Transfer]:
    peer = stage + 1 if compute.direction is Direction.FORWARD else stage - 1
    return [Transfer(True, compute.direction, compute.microbatch, peer)] if 0 <= peer < num_stages else []


def stage_steps(
    stage: int, num_stages: int, num_microbatches: int, is_forward_only: bool = False
) -> list[Step]:
    """The steps of one stage."""
    if is_forward_only:
        return with_transfers(forward_only(num_microbatches), stage, num_stages)
    return with_transfers(one_forward_one_backward(stage, num_stages, num_microbatches), stage, num_stages)


def simulate(stages: list[list[Step]]) -> list[int]:
    """Run all stages with a transport that buffers nothing; the peak number of live microbatches of each stage.

    Raises:
        RuntimeError: the stages wait for each other forever, a microbatch is computed out of order, or a
            transfer is left over.
    """
    position = [0] * len(stages)
    live: list[set[int]] = [set() for _ in stages]
    peak = [0] * len(stages)
    pending: list[set[Transfer]] = [set() for _ in stages]
    progress = True
    while progress:
        progress = False
        for stage, steps in enumerate(stages):
            while position[stage] < len(steps) and isinstance(steps[position[stage]], Compute):
                _compute(steps[position[stage]], live[stage], stage)  # type: ignore[arg-type]
                peak[stage] = max(peak[stage], len(live[stage]))
                position[stage] += 1
                progress = True
            if position[stage] < len(steps) and not pending[stage]:
                pending[stage] = set(steps[position[stage]].transfers)  # type: ignore[union-attr]
        for stage in range(len(stages)):
            for transfer in list(pending[stage]):
                partner = Transfer(not transfer.is_send, transfer.direction, transfer.microbatch, stage)
                if partner in pending[transfer.peer]:
                    for side, done in ((stage, transfer), (transfer.peer, partner)):
                        pending[side].discard(done)
                        position[side] += not pending[side]
                    progress = True
    stuck = {
        stage: steps[position[stage]] for stage, steps in enumerate(stages) if position[stage] < len(steps)
    }
    if stuck or any(live):
        raise RuntimeError(
            f"the schedule does not complete: stages wait at {stuck}, live microbatches {live}"
        )
    return peak


def _compute(compute: Compute, live: set[int], stage: int) -> None:
    if compute.direction is Direction.FORWARD:
        live.add(compute.microbatch)
    elif compute.microbatch in live:
        live.remove(compute.microbatch)
    else:
        raise RuntimeError(f"stage {stage} runs {compute} before its forward")
