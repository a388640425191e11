"""Schedules as data: exhaustively over small sizes, and broken ones that must be refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from megatron.core.pipeline_parallel.check import simulate
from megatron.core.pipeline_parallel.orders import ScheduleRequest, compute_orders, predicted_peaks
from megatron.core.pipeline_parallel.plan import plan_pipeline
from megatron.core.pipeline_parallel.schedule import (
    Backward,
    Compute,
    Direction,
    Forward,
    InputGrad,
    Kind,
    Post,
    Step,
    Transfer,
    Wait,
    WeightGrad,
)
from megatron.core.pipeline_parallel.transfers import with_transfers
from megatron.core.stage_placement import Placement

SIZES = [*product(range(1, 5), range(1, 9)), (4, 12), (5, 7), (6, 6), (6, 13)]
"""Ranks and microbatches."""
ONE_CHUNK = ("gpipe", "1f1b", "zb-h1")
WAYS = [{"overlap": False}, {"overlap": True}, {"overlap": True, "overlap_warmup_flush": True}]


def requests(num_ranks: int, num_microbatches: int) -> list[ScheduleRequest]:
    """Every schedule that such a pipeline can run."""
    found = [ScheduleRequest(name, num_ranks, num_microbatches) for name in ONE_CHUNK]
    found.append(ScheduleRequest("zb-v", num_ranks, num_microbatches, 2))
    for chunks, group in ((2, num_ranks), (2, num_ranks + 1), (4, num_ranks), (3, 2 * num_ranks)):
        if num_microbatches >= group and not 0 < num_microbatches % group < num_ranks:
            found.append(ScheduleRequest("interleaved", num_ranks, num_microbatches, chunks, group))
    found += [replace(r, splits_backward=True) for r in found if r.name == "1f1b" or r.num_chunks == 4]
    return found


def computes(steps: list[Step], *kinds: Kind) -> list[Compute]:
    return [s for s in steps if isinstance(s, Compute) and s.kind in kinds]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_every_schedule_completes_with_the_predicted_memory(num_ranks: int, num_microbatches: int) -> None:
    """With blocking and with overlapped transfers; `simulate` raises unless every send meets its receive in order."""
    for request in requests(num_ranks, num_microbatches):
        for way in WAYS:
            steps = with_transfers(compute_orders(request), request.placement, **way)
            peaks = simulate(steps, request.placement)
            assert [peak.activations for peak in peaks] == predicted_peaks(request), (request, way)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_each_chunk_sees_the_microbatches_once_in_order(num_ranks: int, num_microbatches: int) -> None:
    """So every schedule adds up the gradients in the same order, which makes them equal to the bit."""
    expected = list(range(num_microbatches))
    for request in requests(num_ranks, num_microbatches):
        for order, chunk in product(compute_orders(request), range(request.num_chunks)):
            mine = [compute for compute in order if compute.chunk == chunk]
            splits = bool(computes(mine, Kind.WEIGHT_GRAD))
            kinds = [(Kind.FORWARD,), (Kind.BACKWARD, Kind.INPUT_GRAD)] + [(Kind.WEIGHT_GRAD,)] * splits
            for kind in kinds:
                assert [c.microbatch for c in computes(mine, *kind)] == expected, request


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_evaluation_completes_and_keeps_nothing(num_ranks: int, num_microbatches: int, num_chunks: int) -> None:
    request = ScheduleRequest("interleaved", num_ranks, num_microbatches, num_chunks, is_forward_only=True)
    for way in WAYS:
        plan = plan_pipeline(request, **way)
        assert [peak.activations for peak in plan.peaks] == [1] * num_ranks
        for steps in plan.steps:
            assert len(computes(steps, Kind.FORWARD)) == num_microbatches * num_chunks
            assert computes(steps, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD) == []


def test_orders_of_four_ranks() -> None:
    def order(name: str, rank: int, microbatches: int = 6, chunks: int = 1) -> str:
        return " ".join(map(repr, compute_orders(ScheduleRequest(name, 4, microbatches, chunks))[rank]))  # type: ignore[arg-type]

    assert order("gpipe", 1, 2) == "F0 F1 B0 B1"
    assert order("1f1b", 0) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5"
    assert order("1f1b", 2) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5"
    assert order("1f1b", 3) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"
    assert order("zb-h1", 0, 4) == "F0 F1 F2 F3 I0 W0 I1 W1 I2 W2 I3 W3"
    assert order("zb-h1", 3, 4) == "F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3"
    assert order("interleaved", 3, 4, 2) == "F0 F1 F2 F3 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 B0 B1 B2 B3"


def test_a_split_backward_hands_on_the_input_gradient_first() -> None:
    request = ScheduleRequest("1f1b", 2, 1, splits_backward=True)
    send = Transfer(True, Direction.BACKWARD, 0, peer=0, stage=0)
    receive = Transfer(False, Direction.FORWARD, 0, peer=0, stage=1)
    post = [Post((receive,)), Wait((receive,)), Forward(0), InputGrad(0), Post((send,)), Wait((send,)), WeightGrad(0)]
    assert with_transfers(compute_orders(request), request.placement)[1] == post


def test_a_single_rank_exchanges_nothing() -> None:
    steps = plan_pipeline(ScheduleRequest("1f1b", 1, 2)).steps
    assert steps == [[Forward(0), Backward(0), Forward(1), Backward(1)]]
    chunks = plan_pipeline(ScheduleRequest("interleaved", 1, 1, 2)).steps
    assert chunks == [[Forward(0), Forward(0, 1), Backward(0, 1), Backward(0)]]


def test_steady_state_sends_and_receives_in_one_post() -> None:
    middle = plan_pipeline(ScheduleRequest("1f1b", 3, 4)).steps[1]
    after_forward = middle[middle.index(Forward(2)) + 1]
    send = Transfer(True, Direction.FORWARD, 2, peer=2, stage=2)
    receive = Transfer(False, Direction.BACKWARD, 1, peer=2, stage=1)
    assert isinstance(after_forward, Post)
    assert set(after_forward.transfers) == {send, receive}


def test_overlapped_receives_of_the_steady_state_are_hidden() -> None:
    """A computation lies between the post and the wait of every receive after the first backward, up to the last
    forward."""
    for steps in plan_pipeline(ScheduleRequest("interleaved", 4, 16, 2), overlap=True).steps:
        kinds = [s.kind if isinstance(s, Compute) else None for s in steps]
        steady = range(kinds.index(Kind.BACKWARD) + 1, len(kinds) - kinds[::-1].index(Kind.FORWARD))
        posted = {t: i for i, step in enumerate(steps) if isinstance(step, Post) for t in step.transfers}
        receives = [
            (posted[t], i) for i in steady if isinstance(steps[i], Wait) for t in steps[i].transfers if not t.is_send
        ]
        assert len(receives) > 10
        assert sum(not any(kinds[post:wait]) for post, wait in receives) <= 2


# --- the check ---


def blocking(num_ranks: int = 3, num_microbatches: int = 5) -> list[list[Step]]:
    request = ScheduleRequest("1f1b", num_ranks, num_microbatches)
    return with_transfers(compute_orders(request), request.placement)


def without(steps: list[Step], transfer: Transfer) -> list[Step]:
    """`steps` in which one transfer was forgotten."""
    kept: list[Step] = []
    for step in steps:
        if not isinstance(step, Compute):
            step = type(step)(tuple(t for t in step.transfers if t != transfer))
        if isinstance(step, Compute) or step.transfers:
            kept.append(step)
    assert kept != steps
    return kept


@pytest.mark.parametrize("is_send", [True, False])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.BACKWARD])
@pytest.mark.parametrize("microbatch", [0, 2, 4])
def test_a_forgotten_transfer_is_refused(is_send: bool, direction: Direction, microbatch: int) -> None:
    ranks = blocking()
    to_next = (direction is Direction.FORWARD) == is_send
    stage = 1 if not is_send else (2 if direction is Direction.FORWARD else 0)
    ranks[1] = without(ranks[1], Transfer(is_send, direction, microbatch, 2 if to_next else 0, stage=stage))
    with pytest.raises(RuntimeError, match="does not complete|before it has received its input"):
        simulate(ranks)


def test_a_transfer_forgotten_on_both_sides_is_refused() -> None:
    ranks = blocking(2, 3)
    ranks[0] = without(ranks[0], Transfer(True, Direction.FORWARD, 1, peer=1, stage=1))
    ranks[1] = without(ranks[1], Transfer(False, Direction.FORWARD, 1, peer=0, stage=1))
    with pytest.raises(RuntimeError, match="rank 1 runs F1 before it has received its input"):
        simulate(ranks)


def test_ranks_that_post_in_different_orders_are_refused() -> None:
    """As two sends that wait for each other's receive."""
    there = Transfer(True, Direction.FORWARD, 0, peer=1, stage=1)
    arrives = Transfer(False, Direction.FORWARD, 0, peer=0, stage=1)
    back = Transfer(True, Direction.BACKWARD, 0, peer=0, stage=0)
    returns = Transfer(False, Direction.BACKWARD, 0, peer=1, stage=0)
    first: list[Step] = [Forward(0), Post((there,)), Post((returns,)), Wait((there, returns)), Backward(0)]
    second: list[Step] = [Post((arrives,)), Wait((arrives,)), Forward(0), Backward(0), Post((back,)), Wait((back,))]
    assert [peak.activations for peak in simulate([first, second])] == [1, 1]
    first[1], first[2] = first[2], first[1]
    with pytest.raises(RuntimeError, match=r"does not complete: ranks wait at \{0: .*, 1: "):
        simulate([first, second])


def test_orders_that_wait_for_each_other_are_refused() -> None:
    first = [Forward(0), Backward(0), Forward(1), Backward(1)]
    swapped = [Forward(1), Backward(1), Forward(0), Backward(0)]
    with pytest.raises(RuntimeError, match=r"does not complete: ranks wait forever at \{0: B0, 1: F1\}"):
        with_transfers([first, swapped], Placement(2))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ([Backward(0), Forward(0)], "rank 0 runs B0 before its forward"),
        ([Forward(0), Forward(0), Backward(0)], "rank 0 runs F0 twice"),
        ([Forward(0), Backward(0), Backward(0)], "rank 0 runs B0 (twice|before its forward)"),
        ([Forward(0), Forward(1), Backward(1)], r"live microbatches \{0: \[\(0, 0\)\]\}"),
        ([Forward(0), WeightGrad(0), InputGrad(0)], "rank 0 runs W0 before I0"),
        ([Forward(0), InputGrad(0)], r"live microbatches \{0: \[\(0, 0\)\]\}"),
        ([Forward(0), Backward(0), Post((Transfer(True, Direction.FORWARD, 0, peer=1),))], "transfers"),
        ([Wait((Transfer(True, Direction.FORWARD, 0, peer=1),))], "which it has not posted"),
    ],
)
def test_work_that_makes_no_sense_is_refused(work: list[Step], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        simulate([work])


def test_sending_before_computing_is_refused() -> None:
    send = Transfer(True, Direction.FORWARD, 0, peer=1, stage=1)
    receive = Transfer(False, Direction.FORWARD, 0, peer=0, stage=1)
    with pytest.raises(RuntimeError, match="rank 0 sends .* before it is computed"):
        simulate([[Post((send,)), Wait((send,)), Forward(0)], [Post((receive,)), Wait((receive,)), Forward(0)]])


def test_a_plan_that_would_hang_or_keep_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ranks wait forever at"):
        plan_pipeline(ScheduleRequest("interleaved", 4, 5, 3))
    monkeypatch.setattr("megatron.core.pipeline_parallel.plan.predicted_peaks", lambda request: [1, 1])
    with pytest.raises(RuntimeError, match=r"keeps \[2, 1\] microbatches alive"):
        plan_pipeline(ScheduleRequest("1f1b", 2, 77))
