"""Spans of time on ranks, and what they add up to. Pure values: times in seconds, from the first begin of the step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron.core.pipeline_parallel.plan import PipelinePlan
from megatron.core.pipeline_parallel.schedule import Compute, Kind
from megatron.core.pipeline_parallel.timeline import Costs, Timeline
from megatron.core.pipeline_parallel.timeline import Span as ComputeSpan

SpanKind = Literal["F", "B", "I", "W", "p2p", "collective", "optimizer", "data", "other"]
COMPUTE: dict[str, Kind] = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "I": Kind.INPUT_GRAD, "W": Kind.WEIGHT_GRAD}


@dataclass(frozen=True)
class Span:
    """Something that a rank did."""

    kind: SpanKind
    text: str
    """What it was, in words."""
    start: float
    end: float
    depth: int = 0
    """Number of spans around it."""
    microbatch: int | None = None
    chunk: int | None = None
    cpu_start: float = 0.0
    """Processor time of the thread, in seconds from some moment; 0 at both ends if it is unknown."""
    cpu_end: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start

    @property
    def cpu_seconds(self) -> float:
        """How long its thread had a processor; it may have waited, or other programs may have had it."""
        return self.cpu_end - self.cpu_start

    @property
    def label(self) -> str:
        """A few letters, e.g. F3, or F3.1 on the second model chunk; empty if it is no computation."""
        if self.kind not in COMPUTE:
            return ""
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the layout."""

    tensor: int = 0
    pipeline: int = 0
    context: int = 0
    data: int = 0

    @property
    def replica(self) -> tuple[int, int, int]:
        """What ranks of one pipeline have in common."""
        return self.data, self.context, self.tensor

    def __str__(self) -> str:
        return f"stage {self.pipeline}, data {self.data}, context {self.context}, tensor {self.tensor}"


@dataclass(frozen=True)
class RankSpans:
    """What one rank did, outer spans before those inside them."""

    rank: int
    host: str
    place: Place
    spans: tuple[Span, ...]
    cpu_seconds: float = 0.0
    """Processor time of the step, of all threads of the process."""
    flights: tuple[Span, ...] = ()
    """Communications from launch to the end of the wait for them, beside the spans, by launch."""

    @property
    def computations(self) -> list[Span]:
        """Forwards and backwards."""
        return [span for span in self.spans if span.kind in COMPUTE and span.depth == 0]

    def seconds_of(self, *kinds: SpanKind) -> float:
        """Time in spans of these kinds, counted once where they lie inside each other."""
        return _covered(span for span in self.spans if span.kind in kinds)

    @property
    def seconds_in_flight(self) -> float:
        """Time in which some communication is under way."""
        return _covered(self.flights)

    @property
    def seconds_hidden(self) -> float:
        """Time in which some communication is under way and this rank does not wait for one."""
        waits = [span for span in self.spans if span.kind in ("p2p", "collective")]
        return _covered([*self.flights, *waits]) - _covered(waits)


@dataclass(frozen=True)
class MeasuredStep:
    """One step of a run."""

    iteration: int
    ranks: tuple[RankSpans, ...]
    plan: PipelinePlan
    """What each pipeline should have done."""
    is_synchronized: bool = False
    """Whether the device was waited for at each border of a span, so that nothing overlapped."""
    planned: Timeline = field(init=False)
    """The schedule with the times that its computations took, if transfers cost nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "planned", self.plan.timeline(self.costs()))

    @property
    def seconds(self) -> float:
        """From the first begin to the last end."""
        return max((span.end for rank in self.ranks for span in rank.spans), default=0.0)

    def pipelines(self) -> dict[tuple[int, int, int], list[RankSpans]]:
        """The ranks of each pipeline, by stage."""
        found: dict[tuple[int, int, int], list[RankSpans]] = {}
        for rank in sorted(self.ranks, key=lambda one: (*one.place.replica, one.place.pipeline)):
            found.setdefault(rank.place.replica, []).append(rank)
        return found

    def costs(self) -> Costs:
        """Median time of each computation on each virtual stage, over microbatches and pipelines."""
        placement = self.plan.request.placement
        times: dict[tuple[str, int], list[float]] = {}
        for rank in self.ranks:
            for span in rank.computations:
                stage = placement.stage_of(rank.place.pipeline, span.chunk or 0)
                times.setdefault((span.kind, stage), []).append(span.seconds)

        def medians(*kinds: str) -> list[float]:
            return [
                statistics.median([t for kind in kinds for t in times.get((kind, stage), [])] or [0.0])
                for stage in range(placement.num_stages)
            ]

        return Costs(forward=medians("F"), input_grad=medians("B", "I"), weight_grad=medians("W"))

    @property
    def ideal_bubble(self) -> float:
        """Idle share that the schedule has if all stages are equal and backward takes twice as long as forward."""
        return self.plan.timeline().bubble_fraction

    def measured(self) -> list[Timeline]:
        """The computations of each pipeline, from its first to its last."""
        return [measured_timeline(ranks) for ranks in self.pipelines().values()]

    @property
    def measured_bubble(self) -> float:
        """Share of the time between the first and the last computation in which ranks compute nothing, averaged."""
        timelines = [timeline for timeline in self.measured() if timeline.makespan]
        return statistics.fmean([timeline.bubble_fraction for timeline in timelines]) if timelines else 0.0

    @property
    def processor_share(self) -> float:
        """Share of the computations' time in which their thread had a processor; less where others use it, too."""
        computations = [span for rank in self.ranks for span in rank.computations]
        seconds = sum(span.seconds for span in computations)
        return sum(span.cpu_seconds for span in computations) / seconds if seconds else 1.0

    def share(self, *kinds: SpanKind) -> float:
        """Share of the step that spans of these kinds take, averaged over ranks."""
        if not self.seconds:
            return 0.0
        return statistics.fmean(rank.seconds_of(*kinds) for rank in self.ranks) / self.seconds

    @property
    def hidden_share(self) -> float | None:
        """Of the time in which communication is under way, the share in which ranks do not wait for one."""
        seconds = sum(rank.seconds_in_flight for rank in self.ranks)
        return sum(rank.seconds_hidden for rank in self.ranks) / seconds if seconds else None


def _covered(spans: Iterable[Span]) -> float:
    """Seconds in which there is at least one of them."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans that overlap beside each other, in as few lanes as possible."""
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start):
        free = next((lane for lane in found if lane[-1].end <= span.start), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def measured_timeline(ranks: Sequence[RankSpans]) -> Timeline:
    """The computations of one pipeline, on a clock that starts with the first of them."""
    first = min((span.start for rank in ranks for span in rank.computations), default=0.0)
    return Timeline([list(_compute_spans(i, rank.computations, first)) for i, rank in enumerate(ranks)])


def compute_of(span: Span) -> Compute:
    """The computation that a span of one shows."""
    return Compute(COMPUTE[span.kind], span.microbatch or 0, span.chunk or 0)


def _compute_spans(rank: int, spans: Iterable[Span], first: float) -> Iterable[ComputeSpan]:
    for span in spans:
        yield ComputeSpan(rank, compute_of(span), span.start - first, span.end - first)
