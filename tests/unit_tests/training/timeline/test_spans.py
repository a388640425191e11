"""What spans add up to."""

from __future__ import annotations

import pytest

from megatron.core.pipeline_parallel.timeline import Costs
from megatron.training.timeline.spans import Place, RankSpans, Span, lanes
from tests.unit_tests.training.timeline.steps import perfect_step


@pytest.mark.parametrize("stages, microbatches", [(1, 3), (2, 4), (4, 8), (4, 2)])
def test_a_step_that_goes_as_planned_has_the_bubble_of_its_schedule(stages: int, microbatches: int) -> None:
    step = perfect_step(stages, microbatches, replicas=2)
    expected = (stages - 1) / (microbatches + stages - 1)
    assert step.measured_bubble == pytest.approx(expected)
    assert step.planned.bubble_fraction == pytest.approx(expected)
    assert step.ideal_bubble == pytest.approx(expected)


def test_the_plan_takes_the_measured_times_of_each_stage() -> None:
    """A slow last stage makes the others wait: more than the schedule alone."""
    costs = Costs(forward=[1e-3, 1e-3, 1e-3, 2e-3], input_grad=2e-3, weight_grad=0.0)
    step = perfect_step(costs=costs)
    found = step.costs()
    assert found.forward == pytest.approx([1e-3, 1e-3, 1e-3, 2e-3])
    assert found.input_grad == pytest.approx([2e-3] * 4) and found.weight_grad == [0.0] * 4
    assert step.measured_bubble == pytest.approx(step.planned.bubble_fraction)
    assert step.planned.bubble_fraction > step.ideal_bubble + 0.05


@pytest.mark.parametrize("name, chunks", [("interleaved", 2), ("zb-h1", 1), ("zb-v", 2), ("gpipe", 1)])
def test_every_schedule(name: str, chunks: int) -> None:
    step = perfect_step(2, 4, name=name, chunks=chunks)
    assert step.measured_bubble == pytest.approx(step.planned.bubble_fraction)
    assert (step.measured_bubble == pytest.approx(step.ideal_bubble)) or name == "zb-h1"


def test_a_delay_is_a_bubble() -> None:
    late = perfect_step(2, 4)
    spans = tuple(
        Span(s.kind, s.text, s.start + 1e-3, s.end + 1e-3, s.depth, s.microbatch, s.chunk) if s.label == "B3" else s
        for s in late.ranks[0].spans
    )
    rank = RankSpans(0, "", late.ranks[0].place, spans)
    delayed = type(late)(3, (rank, late.ranks[1]), late.plan)
    busy, length = 2 * 4 * 3.0, (4 + 2 - 1) * 3.0 + 1.0  # ms
    assert delayed.measured_bubble == pytest.approx(1 - busy / (2 * length))
    assert delayed.planned.bubble_fraction == pytest.approx(late.planned.bubble_fraction)


def test_time_in_spans_inside_each_other_counts_once() -> None:
    spans = (
        Span("collective", "", 0, 4),
        Span("collective", "", 1, 2, 1),
        Span("collective", "", 3, 6),
        Span("p2p", "", 9, 9.5),
    )
    rank = RankSpans(0, "", Place(), spans)
    assert rank.seconds_of("collective") == 6.0
    assert rank.seconds_of("p2p", "collective") == 6.5
    assert rank.seconds_of("W") == 0.0


def test_what_is_hidden_is_in_flight_and_not_waited_for() -> None:
    spans = (Span("B", "", 0, 6), Span("collective", "", 5, 8), Span("F", "", 8, 20), Span("p2p", "", 10, 11))
    flights = (Span("collective", "", 1, 8), Span("collective", "", 3, 12), Span("p2p", "", 15, 16))
    rank = RankSpans(0, "", Place(), spans, flights=flights)
    assert rank.seconds_in_flight == 12.0  # 1 to 12, 15 to 16
    assert rank.seconds_hidden == 8.0  # without 5 to 8 and 10 to 11
    assert RankSpans(0, "", Place(), spans).seconds_hidden == 0.0


def test_spans_that_overlap_lie_in_lanes() -> None:
    a, b, c, d = (Span("p2p", "", start, end) for start, end in ((0, 4), (1, 2), (2, 3), (4, 5)))
    assert lanes([d, c, b, a]) == [[a, d], [b, c]]
    assert lanes([]) == []


def test_ranks_of_a_pipeline_belong_together() -> None:
    step = perfect_step(2, 2, replicas=2)
    assert [[rank.rank for rank in ranks] for ranks in step.pipelines().values()] == [[0, 2], [1, 3]]


def test_labels() -> None:
    assert Span("F", "", 0, 1, microbatch=3, chunk=0).label == "F3"
    assert Span("W", "", 0, 1, microbatch=3, chunk=1).label == "W3.1"
    assert Span("p2p", "", 0, 1, microbatch=3).label == ""
