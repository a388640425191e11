"""Where in each rank's list its transfers are posted and waited for.

All messages of a step have one order: that in which a pipeline with equal costs would send them. Every rank posts
what it sends and receives in this order, so that (by induction over it) no transport can deadlock: of the messages
not yet through, the first has both its ends posted, whether the transport buffers, matches ends strictly in the order
in which they were posted, or completes the transfers of a post only together.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from megatron.core.pipeline_parallel.schedule import (
    Compute,
    Direction,
    Kind,
    Order,
    Post,
    Step,
    Transfer,
    Wait,
)
from megatron.core.pipeline_parallel.timeline import Span, planned_timeline
from megatron.core.stage_placement import Placement

COMPUTATIONS_BEHIND_A_SEND = 2
"""Overlapped: so many computations run before a rank waits until what it sent has left."""


@dataclass(frozen=True)
class Message:
    """What one microbatch leaves at a border between ranks; compares by when it is sent."""

    time: float
    direction: Direction
    microbatch: int
    stage: int
    """The virtual stage that takes it."""
    source: Span


@dataclass
class _Gap:
    """What happens between two computations of a rank: first waits for sends, then posts, then waits for receives."""

    sent: list[Transfer] = field(default_factory=list)
    posts: list[Transfer] = field(default_factory=list)
    needed: list[Transfer] = field(default_factory=list)


def with_transfers(
    orders: list[Order], placement: Placement, *, overlap: bool = False, overlap_warmup_flush: bool = False
) -> list[list[Step]]:
    """The orders with their transfers.

    Args:
        overlap: post a receive before the computation during which the message is expected, and wait for it just before
            it is used; wait for a send `COMPUTATIONS_BEHIND_A_SEND` later. Otherwise a rank posts all that leaves or
            comes between two computations together and waits for it at once.
        overlap_warmup_flush: overlap also before a rank's first backward and after its last forward.

    Raises:
        RuntimeError: the ranks wait for each other forever, whatever the transfers.
    """
    rows = planned_timeline(orders, placement).ranks
    ranks = [_RankTransfers(row, overlap, overlap_warmup_flush) for row in rows]

    def urgency(message: Message) -> tuple[float, float, int, int]:
        """Of two sent at the same time the one that is used sooner goes first, so that it can be received ahead."""
        holder = placement.holder_of(message.stage)
        return message.time, ranks[holder.rank].time_of_use(message, holder.chunk), holder.rank, message.stage

    for message in sorted(messages(rows, placement), key=urgency):
        sender, receiver = message.source.rank, placement.holder_of(message.stage).rank
        ranks[sender].send(message, receiver)
        ranks[receiver].receive(message, sender, placement)
    return [rank.steps() for rank in ranks]


def messages(rows: list[list[Span]], placement: Placement) -> list[Message]:
    """All messages between ranks, in no particular order."""
    found = []
    for span in (span for row in rows for span in row):
        target = target_of(span.compute, placement.stage_of(span.rank, span.compute.chunk), placement)
        if target is not None and placement.holder_of(target).rank != span.rank:
            direction = Direction.FORWARD if span.compute.kind is Kind.FORWARD else Direction.BACKWARD
            found.append(Message(span.end, direction, span.compute.microbatch, target, span))
    return found


def target_of(compute: Compute, stage: int, placement: Placement) -> int | None:
    """The virtual stage that takes what a computation on `stage` gives; None if it gives nothing to another."""
    if compute.kind is Kind.WEIGHT_GRAD:
        return None
    target = stage + 1 if compute.kind is Kind.FORWARD else stage - 1
    return target if 0 <= target < placement.num_stages else None


class _RankTransfers:
    """The gaps of one rank while messages are put into them."""

    def __init__(self, row: list[Span], overlap: bool, overlap_warmup_flush: bool) -> None:
        self.row, self.overlap = row, overlap
        self.starts, self.ends = [span.start for span in row], [span.end for span in row]
        self.index = {span.compute: i for i, span in enumerate(row)}
        self.gaps = [_Gap() for _ in range(len(row) + 1)]
        self.latest = 0
        """Gap of the last message so far: what comes after it in the order is posted no earlier."""
        forwards = [i for i, span in enumerate(row) if span.compute.kind is Kind.FORWARD]
        backwards = [i for i, span in enumerate(row) if span.compute.kind is not Kind.FORWARD]
        self.steady = range(len(row))
        if not overlap_warmup_flush and backwards:
            self.steady = range(backwards[0], forwards[-1] + 1)

    def send(self, message: Message, receiver: int) -> None:
        done = self.index[message.source.compute]
        transfer = Transfer(
            True, message.direction, message.microbatch, receiver, message.source.compute.chunk, message.stage
        )
        self._post(transfer, done + 1)
        behind = COMPUTATIONS_BEHIND_A_SEND if self.overlap else 0
        gap = self.gaps[min(done + 1 + behind, len(self.row))]
        (gap.sent if behind and gap is not self.gaps[done + 1] else gap.needed).append(transfer)

    def receive(self, message: Message, sender: int, placement: Placement) -> None:
        chunk = placement.holder_of(message.stage).chunk
        user = self._user(message, chunk)
        transfer = Transfer(False, message.direction, message.microbatch, sender, chunk, message.stage)
        if self.overlap and user in self.steady:
            gap = min(bisect_left(self.ends, message.time), user)  # the last gap that opens before it is sent
            self._post(transfer, gap)
            self.gaps[user].needed.append(transfer)
        else:
            gap = bisect_left(self.starts, message.time)  # the first gap still open when it is sent
            self.gaps[self._post(transfer, gap)].needed.append(transfer)

    def time_of_use(self, message: Message, chunk: int) -> float:
        """When a message for this rank is needed."""
        return self.starts[self._user(message, chunk)]

    def _user(self, message: Message, chunk: int) -> int:
        """Which computation needs the message."""
        kinds = (Kind.FORWARD,) if message.direction is Direction.FORWARD else (Kind.BACKWARD, Kind.INPUT_GRAD)
        found = (self.index.get(Compute(kind, message.microbatch, chunk)) for kind in kinds)
        return next(i for i in found if i is not None)

    def _post(self, transfer: Transfer, gap: int) -> int:
        self.latest = max(self.latest, gap)
        self.gaps[self.latest].posts.append(transfer)
        return self.latest

    def steps(self) -> list[Step]:
        """The rank's list."""
        steps: list[Step] = []
        for i, gap in enumerate(self.gaps):
            steps += [Wait(tuple(gap.sent))] if gap.sent else []
            steps += [Post(tuple(gap.posts))] if gap.posts else []
            steps += [Wait(tuple(gap.needed))] if gap.needed else []
            if i < len(self.row):
                steps.append(self.row[i].compute)
        return steps
