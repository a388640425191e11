"""The bubble that a step would have had without other programs on its processors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.core.pipeline_parallel.timeline import Costs
from megatron.training.timeline.spans import MeasuredStep, RankSpans, Span
from megatron.training.timeline.undisturbed import undisturbed
from tests.unit_tests.training.timeline.steps import perfect_step

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)]


def with_processors(step: MeasuredStep, gap: float = 0.0) -> MeasuredStep:
    """Every computation has a processor for all its time, and there are `gap` seconds of other work between two."""
    ranks = []
    for rank in step.ranks:
        spans, clock = [], 1.0
        for span in rank.computations:
            spans.append(replace(span, cpu_start=clock, cpu_end=clock + span.seconds))
            clock += span.seconds + gap
        ranks.append(replace(rank, spans=tuple(spans)))
    return MeasuredStep(step.iteration, tuple(ranks), step.plan)


def preempted(rank: RankSpans, label: str, seconds: float) -> RankSpans:
    """The computation takes so much longer by the clock, and all after it on this rank is later."""
    at = next(span.start for span in rank.spans if span.label == label)
    spans = tuple(
        replace(span, start=span.start + seconds * (span.start > at), end=span.end + seconds * (span.start >= at))
        for span in rank.spans
    )
    return replace(rank, spans=spans)


@pytest.mark.parametrize("name, chunks", SCHEDULES)
def test_a_step_that_goes_as_planned(name: str, chunks: int) -> None:
    step = with_processors(perfect_step(2, 4, replicas=2, name=name, chunks=chunks))
    found = undisturbed(step)
    assert found is not None and step.processor_share == pytest.approx(1.0)
    assert found.bubble == pytest.approx(step.ideal_bubble) and found.even_bubble == pytest.approx(step.ideal_bubble)


@pytest.mark.parametrize("name, chunks", SCHEDULES)
def test_preemption_is_no_bubble(name: str, chunks: int) -> None:
    alone = with_processors(perfect_step(2, 4, name=name, chunks=chunks))
    step = replace(alone, ranks=(alone.ranks[0], preempted(alone.ranks[1], "F1", 0.05)))
    found = undisturbed(step)
    assert found is not None and step.measured_bubble > 2 * step.ideal_bubble and step.processor_share < 0.5
    assert found.bubble == pytest.approx(step.ideal_bubble)


def test_other_work_of_a_rank_is_a_bubble() -> None:
    """1F1B on one rank, whose gaps nothing can hide."""
    found = undisturbed(with_processors(perfect_step(1, 3), gap=1e-3))
    assert found is not None and found.even_bubble == 0.0
    assert found.bubble == pytest.approx(5 / (5 + 9))  # five gaps of 1 ms between computations of 9 ms together


def test_unequal_stages_are_a_bubble_that_the_schedule_does_not_have() -> None:
    costs = Costs(forward=[1e-3, 3e-3], input_grad=2e-3, weight_grad=0.0)
    step = with_processors(perfect_step(2, 4, costs=costs))
    found = undisturbed(step)
    assert found is not None and found.even_bubble == pytest.approx(1 / 5)
    assert found.bubble == pytest.approx(step.planned.bubble_fraction) and found.bubble > 0.25


def test_transfers_are_waited_for() -> None:
    """F0 on rank 1 begins 0.5 ms after F0 on rank 0 has ended, and B0 on rank 0 as long after B0 on rank 1."""
    step = with_processors(perfect_step(2, 1))
    (forward, backward), other = step.ranks[0].spans, step.ranks[1].spans
    there = tuple(replace(span, start=span.start + 5e-4, end=span.end + 5e-4) for span in other)
    back = replace(backward, start=backward.start + 1e-3, end=backward.end + 1e-3)
    ranks = replace(step.ranks[0], spans=(forward, back)), replace(step.ranks[1], spans=there)
    found = undisturbed(replace(step, ranks=ranks))
    assert found is not None and found.bubble == pytest.approx(1 - 6.0 / (2 * 7.0))  # 6 ms of work, 1 ms of transfers
    assert found.bubble_without_transfers == pytest.approx(1 / 2)


def test_unknown_where_processor_time_does_not_tell() -> None:
    assert undisturbed(perfect_step()) is None  # collectives inside of computations
    step = with_processors(perfect_step(2, 4))
    last = step.ranks[0].spans[-1].end
    after = (Span("optimizer", "optimizer", last, last + 2), Span("collective", "norm", last, last + 1, depth=1))
    rank = replace(step.ranks[0], spans=(*step.ranks[0].spans, *after))
    assert undisturbed(replace(step, ranks=(rank, step.ranks[1]))) == undisturbed(step) is not None
    assert undisturbed(replace(with_processors(perfect_step()), is_synchronized=True)) is None
    step = with_processors(perfect_step())
    assert undisturbed(replace(step, ranks=(replace(step.ranks[0], spans=()), *step.ranks[1:]))) is None
