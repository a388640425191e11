"""A schedule run without processes: proves that it completes, and counts what it keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedule import Compute, Direction, Kind, Post, Step, Transfer
from megatron.core.pipeline_parallel.transfers import target_of
from megatron.core.stage_placement import Placement


@dataclass(frozen=True)
class Peaks:
    """The largest numbers a rank has at once."""

    activations: int
    """(Microbatch, chunk) whose forward has run and whose last part of backward has not."""
    in_flight: int
    """Transfers posted and not waited for."""


def simulate(ranks: list[list[Step]], placement: Placement | None = None) -> list[Peaks]:
    """Run all ranks with the strictest transport; the peaks of each.

    This transport buffers nothing, works on one post of a rank at a time, in order, and ends a post only when all its
    transfers are through. A schedule that completes with it completes with gloo, and with NCCL whether transfers are
    batched or not. In training, activations are alive from the forward to the last part of the backward; in
    evaluation only while the forward runs.

    Args:
        placement: one chunk on each rank by default.

    Raises:
        RuntimeError: the ranks wait for each other forever, or one of them uses or sends what it cannot have yet,
        computes
            something twice, waits for what was never posted, or leaves out something.
    """
    placement = placement or Placement(len(ranks))
    runs = [_RankRun(rank, placement, steps) for rank, steps in enumerate(ranks)]
    progress = True
    while progress:
        progress = sum(run.advance() for run in runs) > 0
        for run in runs:
            for transfer in list(run.head):
                if transfer.peer in range(len(runs)):
                    progress |= _meet(run, transfer, runs[transfer.peer])
    stuck = {run.rank: run.steps[run.position] for run in runs if run.position < len(run.steps)}
    left = {run.rank: sorted(run.live) for run in runs if run.live}
    unsent = {run.rank: run.head for run in runs if run.head}
    if stuck or left or unsent:
        raise RuntimeError(
            f"the schedule does not complete: ranks wait at {stuck}, live microbatches {left}, transfers {unsent}"
        )
    return [Peaks(run.peak, run.peak_in_flight) for run in runs]


def _meet(run: _RankRun, transfer: Transfer, peer: _RankRun) -> bool:
    for other in peer.head:
        if other.peer == run.rank and other.is_send != transfer.is_send and other.message == transfer.message:
            run.complete(transfer)
            peer.complete(other)
            return True
    return False


class _RankRun:
    """How far a rank has come."""

    def __init__(self, rank: int, placement: Placement, steps: list[Step]) -> None:
        self.rank, self.placement, self.steps = rank, placement, steps
        self.position = 0
        self.posts: list[list[Transfer]] = []
        """Posted and not through; the transport works on the first."""
        self.in_flight: set[Transfer] = set()
        self.through: set[Transfer] = set()
        self.ready: set[tuple[Direction, int, int]] = set()
        """Messages for this rank's stages that computations may use."""
        self.done: set[Compute] = set()
        self.live: set[tuple[int, int]] = set()
        self.peak = self.peak_in_flight = 0
        self.trains = any(isinstance(s, Compute) and s.kind is not Kind.FORWARD for s in steps)
        self.splits = {(s.microbatch, s.chunk) for s in steps if isinstance(s, Compute) and s.kind is Kind.WEIGHT_GRAD}

    @property
    def head(self) -> list[Transfer]:
        """What the transport works on."""
        return self.posts[0] if self.posts else []

    def advance(self) -> bool:
        """Go on to the next transfer that is not through; whether anything was done."""
        before = self.position
        while self.position < len(self.steps):
            step = self.steps[self.position]
            if isinstance(step, Compute):
                self._compute(step)
            elif isinstance(step, Post):
                self._post(step.transfers)
            elif not self._arrived(step.transfers):
                break
            self.position += 1
        return self.position > before

    def complete(self, transfer: Transfer) -> None:
        """A transfer has met its other end; a post ends with its last one."""
        self.posts[0].remove(transfer)
        self.through.add(transfer)
        while self.posts and not self.posts[0]:
            self.posts.pop(0)

    def _post(self, transfers: tuple[Transfer, ...]) -> None:
        kinds = {Direction.FORWARD: (Kind.FORWARD,), Direction.BACKWARD: (Kind.BACKWARD, Kind.INPUT_GRAD)}
        for transfer in transfers:
            made = {Compute(kind, transfer.microbatch, transfer.chunk) for kind in kinds[transfer.direction]}
            self._require(not transfer.is_send or bool(made & self.done), f"sends {transfer} before it is computed")
        self.posts.append(list(transfers))
        self.in_flight |= set(transfers)
        self.peak_in_flight = max(self.peak_in_flight, len(self.in_flight))

    def _arrived(self, transfers: tuple[Transfer, ...]) -> bool:
        for transfer in transfers:
            self._require(transfer in self.in_flight, f"waits for {transfer}, which it has not posted")
        if not self.through.issuperset(transfers):
            return False
        self.in_flight -= set(transfers)
        self.ready |= {transfer.message for transfer in transfers if not transfer.is_send}
        return True

    def _compute(self, compute: Compute) -> None:
        self._require(compute not in self.done, f"runs {compute} twice")
        stage = self.placement.stage_of(self.rank, compute.chunk)
        key = (compute.microbatch, compute.chunk)
        if compute.kind is Kind.WEIGHT_GRAD:
            before = Compute(Kind.INPUT_GRAD, *key)
            self._require(before in self.done, f"runs {compute} before {before}")
        else:
            self._require_input(compute, stage)
        if compute.kind is Kind.FORWARD:
            self.live.add(key)
            self.peak = max(self.peak, len(self.live))
        else:
            self._require(key in self.live, f"runs {compute} before its forward")
        self.done.add(compute)
        self._hand_over(compute, stage)
        ends_with = Kind.FORWARD if not self.trains else Kind.WEIGHT_GRAD if key in self.splits else Kind.BACKWARD
        if compute.kind is ends_with:
            self.live.remove(key)

    def _require_input(self, compute: Compute, stage: int) -> None:
        is_forward = compute.kind is Kind.FORWARD
        source = stage - 1 if is_forward else stage + 1
        if 0 <= source < self.placement.num_stages:
            direction = Direction.FORWARD if is_forward else Direction.BACKWARD
            has_input = (direction, compute.microbatch, stage) in self.ready
            self._require(has_input, f"runs {compute} before it has received its input")

    def _hand_over(self, compute: Compute, stage: int) -> None:
        """What this rank's own next chunk takes needs no transfer."""
        target = target_of(compute, stage, self.placement)
        if target is not None and self.placement.holder_of(target).rank == self.rank:
            direction = Direction.FORWARD if compute.kind is Kind.FORWARD else Direction.BACKWARD
            self.ready.add((direction, compute.microbatch, target))

    def _require(self, condition: bool, complaint: str) -> None:
        if not condition:
            raise RuntimeError(f"rank {self.rank} {complaint}")
