"""Planned times against the bubbles that the papers give."""

from __future__ import annotations

import pytest

from megatron.core.pipeline_parallel.orders import ScheduleRequest
from megatron.core.pipeline_parallel.plan import plan_pipeline
from megatron.core.pipeline_parallel.schedule import Forward, InputGrad, Kind, WeightGrad
from megatron.core.pipeline_parallel.timeline import Costs, Span, planned_timeline
from megatron.core.stage_placement import Placement

F, I, W = 2.0, 3.0, 1.5
COSTS = Costs(F, I, W)


def idle(request: ScheduleRequest, costs: Costs) -> float:
    """Time in which the busiest rank does nothing."""
    timeline = plan_pipeline(request).timeline(costs)
    return timeline.makespan - max(sum(s.end - s.start for s in row) for row in timeline.ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_one_forward_one_backward(name: str, ranks: int) -> None:
    """(P - 1) (F + B), arXiv:2104.04473, section 2.2.1."""
    request = ScheduleRequest(name, ranks, 2 * ranks)  # type: ignore[arg-type]
    assert idle(request, COSTS) == pytest.approx((ranks - 1) * (F + I + W))
    expected = (ranks - 1) / (3 * ranks - 1)
    assert plan_pipeline(request).timeline(COSTS).bubble_fraction == pytest.approx(expected)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_bubble_of_interleaving(ranks: int, chunks: int) -> None:
    """(P - 1) (F + B) / V, section 2.2.2; the costs here are of one chunk."""
    assert idle(ScheduleRequest("interleaved", ranks, 2 * ranks, chunks), Costs()) == (ranks - 1) * 3


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_bubble_of_zero_bubble_h1(ranks: int) -> None:
    """(P - 1) (F + I - W), arXiv:2401.10241, table 2."""
    assert idle(ScheduleRequest("zb-h1", ranks, 3 * ranks), Costs()) == ranks - 1
    assert idle(ScheduleRequest("zb-h1", ranks, 3 * ranks), Costs(2.0, 2.0, 1.0)) == (ranks - 1) * 3


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
def test_bubble_of_zero_bubble_v(ranks: int) -> None:
    """Only the way of the first microbatch to the last rank, in half stages."""
    for microbatches in (ranks, 2 * ranks - 1, 2 * ranks, 2 * ranks + 1, 4 * ranks):
        assert idle(ScheduleRequest("zb-v", ranks, microbatches, 2), Costs()) == ranks - 1


def test_costs_differ_between_stages_and_transfers_take_time() -> None:
    timeline = planned_timeline(
        [[Forward(0), InputGrad(0), WeightGrad(0)]] * 2,
        Placement(2),
        Costs(forward=[1, 10], input_grad=[2, 20], weight_grad=[3, 30], transfer=0.5),
    )
    assert timeline.ranks[0] == [
        Span(0, Forward(0), 0, 1),
        Span(0, InputGrad(0), 32, 34),
        Span(0, WeightGrad(0), 34, 37),
    ]
    assert timeline.ranks[1] == [
        Span(1, Forward(0), 1.5, 11.5),
        Span(1, InputGrad(0), 11.5, 31.5),
        Span(1, WeightGrad(0), 31.5, 61.5),
    ]
    assert timeline.makespan == 61.5
    assert timeline.bubble_fraction == pytest.approx(1 - 66 / 123)


def test_a_v_hands_over_without_a_transfer_at_its_turn() -> None:
    order = [Forward(0), Forward(0, 1)]
    timeline = planned_timeline([order, order], Placement(2, 2, "v"), Costs(transfer=5))
    assert [span.start for span in timeline.ranks[0]] == [0, 13]
    assert [span.start for span in timeline.ranks[1]] == [6, 7]


def test_an_empty_pipeline_has_no_bubble() -> None:
    timeline = planned_timeline([[], []], Placement(2))
    assert (timeline.makespan, timeline.bubble_fraction) == (0, 0)
    assert Costs().of(Kind.BACKWARD, 0) == 2
