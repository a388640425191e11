"""A recorded step as it would have gone on processors of its own: for machines that other programs use, too.

A rank that is preempted makes those that wait for it look idle. So each computation, and all that its rank did since
the one before, is given the processor time that it took, and starts once its rank and its input are ready.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.core.pipeline_parallel.plan import PipelinePlan
from megatron.core.pipeline_parallel.schedule import Compute
from megatron.core.pipeline_parallel.timeline import Costs
from megatron.training.timeline.spans import COMPUTE, MeasuredStep, RankSpans, Span, compute_of

Where = tuple[Compute, int]
"""A computation on a virtual stage."""


@dataclass(frozen=True)
class ProcessorTimes:
    """What `PipelinePlan.timeline` asks for, of one pipeline in one recorded step."""

    works: dict[Where, float]
    """Of each computation."""
    gaps: dict[Where, float]
    """Of what its rank did between the computation before it and this one."""
    transfer: float
    """From the end of a computation to the begin of one on another rank that waited for its result, by the clock."""

    def work(self, compute: Compute, stage: int) -> float:
        """Seconds of a computation."""
        return self.works[compute, stage]

    def gap(self, compute: Compute, stage: int) -> float:
        """Seconds of other work before it."""
        return self.gaps[compute, stage]

    def even(self) -> Costs:
        """The mean time of each kind of computation, the same on all stages; nothing else takes time."""
        means = {}
        for kind in "FBIW":
            times = [seconds for (compute, _), seconds in self.works.items() if compute.kind.value == kind]
            means[kind] = statistics.fmean(times) if times else 0.0
        return Costs(means["F"], means["B"] + means["I"], means["W"])


@dataclass(frozen=True)
class Undisturbed:
    """Idle shares of the step, averaged over its pipelines."""

    bubble: float
    """As the step would have gone, if transfers take as long as the quickest one did."""
    bubble_without_transfers: float
    """The same if they take no time: what can be said where even the quickest waited for a processor."""
    even_bubble: float
    """Of the schedule alone, if every stage took the mean time of each kind of computation."""


def undisturbed(step: MeasuredStep) -> Undisturbed | None:
    """The idle shares without other programs; None where processor time does not say how long a computation takes:
    on accelerators, with collectives inside computations, and without computations.
    """
    pipelines = list(step.pipelines().values())
    if step.is_synchronized or not all(rank.computations and _computes_alone(rank) for rank in step.ranks):
        return None
    times = [processor_times(ranks, step.plan) for ranks in pipelines]
    return Undisturbed(
        statistics.fmean(step.plan.timeline(one).bubble_fraction for one in times),
        statistics.fmean(step.plan.timeline(replace(one, transfer=0.0)).bubble_fraction for one in times),
        statistics.fmean(step.plan.timeline(one.even()).bubble_fraction for one in times),
    )


def _computes_alone(rank: RankSpans) -> bool:
    """Whether nothing is communicated inside of computations."""
    ends = 0.0
    for span in rank.spans:  # outer ones come first
        if span.kind in ("collective", "p2p") and span.start < ends:
            return False
        if span.kind in COMPUTE and span.depth == 0:
            ends = span.end
    return True


def processor_times(ranks: Sequence[RankSpans], plan: PipelinePlan) -> ProcessorTimes:
    """Of one pipeline, its ranks by stage."""
    placement = plan.request.placement
    works: dict[Where, float] = {}
    gaps: dict[Where, float] = {}
    for stage, rank in enumerate(ranks):
        before: Span | None = None
        for span in rank.computations:
            place = compute_of(span), placement.stage_of(stage, span.chunk or 0)
            works[place] = span.cpu_seconds
            gaps[place] = span.cpu_start - before.cpu_end if before is not None else 0.0
            before = span
    return ProcessorTimes(works, gaps, _transfer_seconds(ranks, plan))


def _transfer_seconds(ranks: Sequence[RankSpans], plan: PipelinePlan) -> float:
    """The quickest: others were delayed by more than the transfer. 0 if nobody waited."""
    placement = plan.request.placement
    ends = {
        (span.kind == "F", span.microbatch, placement.stage_of(stage, span.chunk or 0)): span.end
        for stage, rank in enumerate(ranks)
        for span in rank.computations
        if span.kind != "W"
    }
    found = []
    for stage, rank in enumerate(ranks):
        free = 0.0
        for span in rank.computations:
            is_forward, own = span.kind == "F", placement.stage_of(stage, span.chunk or 0)
            ready = ends.get((is_forward, span.microbatch, own - 1 if is_forward else own + 1))
            if span.kind != "W" and ready is not None and free < ready <= span.start:
                found.append(span.start - ready)
            free = span.end
    return min(found, default=0.0)
