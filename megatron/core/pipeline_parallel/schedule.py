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


def stage_steps(stage: int, num_stages: int, num_microbatches: int, is_forward_only: bool = False) -> list[Step]:
    """The steps of one stage."""
    if is_forward_only:
        return with_transfers(forward_only(num_microbatches), stage, num_stages)
    return with_transfers(one_forward_one_backward(stage, num_stages, num_microbatches), stage, num_stages)


def simulate(stages: list[list[Step]]) -> list[int]:
    """Run all stages with a transport that buffers nothing; each stage's peak number of live microbatches.

    A microbatch is live from its forward to its backward; in evaluation, only while its forward runs.

    Raises:
        RuntimeError: the stages wait for each other forever, or a stage computes or sends what it cannot have
            yet, computes something twice, or leaves out a backward.
    """
    runs = [_StageRun(stage, len(stages), steps) for stage, steps in enumerate(stages)]
    progress = True
    while progress:
        progress = sum(run.advance() for run in runs) > 0
        for run in runs:
            for transfer in list(run.pending):
                partner = Transfer(not transfer.is_send, transfer.direction, transfer.microbatch, run.stage)
                if transfer.peer in range(len(runs)) and partner in runs[transfer.peer].pending:
                    run.complete(transfer)
                    runs[transfer.peer].complete(partner)
                    progress = True
    stuck = {run.stage: run.steps[run.position] for run in runs if run.position < len(run.steps)}
    live = {run.stage: sorted(run.live) for run in runs if run.live}
    if stuck or live:
        raise RuntimeError(f"the schedule does not complete: stages wait at {stuck}, live microbatches {live}")
    return [run.peak for run in runs]


class _StageRun:
    """How far a stage has come."""

    def __init__(self, stage: int, num_stages: int, steps: list[Step]) -> None:
        self.stage, self.num_stages, self.steps = stage, num_stages, steps
        self.position = 0
        self.pending: set[Transfer] = set()
        self.done: set[Compute] = set()
        self.received: set[Transfer] = set()
        self.live: set[int] = set()
        self.peak = 0
        self.trains = any(isinstance(s, Compute) and s.direction is Direction.BACKWARD for s in steps)

    def advance(self) -> bool:
        """Compute up to the next exchange and post that; whether anything was computed."""
        before = self.position
        while self.position < len(self.steps):
            step = self.steps[self.position]
            if isinstance(step, Exchange):
                if not self.pending:
                    self._post(step)
                break
            self._compute(step)
            self.position += 1
        return self.position > before

    def complete(self, transfer: Transfer) -> None:
        """A transfer has met its partner; the exchange ends with its last one."""
        self.pending.discard(transfer)
        self.received.add(transfer)
        self.position += not self.pending

    def _post(self, exchange: Exchange) -> None:
        for transfer in exchange.transfers:
            self._require(
                not transfer.is_send or Compute(transfer.direction, transfer.microbatch) in self.done,
                f"sends {transfer} before it is computed",
            )
        self.pending = set(exchange.transfers)

    def _compute(self, compute: Compute) -> None:
        self._require(compute not in self.done, f"runs {compute} twice")
        for transfer in _needs(compute, self.stage, self.num_stages):
            self._require(transfer in self.received, f"runs {compute} before it has received its input")
        self.done.add(compute)
        if compute.direction is Direction.FORWARD:
            self.live.add(compute.microbatch)
            self.peak = max(self.peak, len(self.live))
        else:
            self._require(compute.microbatch in self.live, f"runs {compute} before its forward")
        if compute.direction is Direction.BACKWARD or not self.trains:
            self.live.remove(compute.microbatch)

    def _require(self, condition: bool, complaint: str) -> None:
        if not condition:
            raise RuntimeError(f"stage {self.stage} {complaint}")
