"""Schedules as data: exhaustively over small sizes, and broken ones that must be refused."""

from __future__ import annotations

from itertools import product

import pytest

from megatron.core.pipeline_parallel.schedule import (
    Backward,
    Compute,
    Direction,
    Exchange,
    Forward,
    Step,
    Transfer,
    forward_only,
    one_forward_one_backward,
    simulate,
    stage_steps,
    with_transfers,
)

SIZES = list(product(range(1, 7), range(1, 13)))
"""Stages and microbatches."""


def pipeline(num_stages: int, num_microbatches: int, is_forward_only: bool = False) -> list[list[Step]]:
    return [stage_steps(stage, num_stages, num_microbatches, is_forward_only) for stage in range(num_stages)]


def microbatches(steps: list[Step], direction: Direction) -> list[int]:
    return [s.microbatch for s in steps if isinstance(s, Compute) and s.direction is direction]


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_training_completes_with_the_least_memory(num_stages: int, num_microbatches: int) -> None:
    stages = pipeline(num_stages, num_microbatches)
    assert simulate(stages) == [min(num_stages - stage, num_microbatches) for stage in range(num_stages)]


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_evaluation_completes_and_keeps_nothing(num_stages: int, num_microbatches: int) -> None:
    stages = pipeline(num_stages, num_microbatches, is_forward_only=True)
    assert simulate(stages) == [1] * num_stages
    for steps in stages:
        assert microbatches(steps, Direction.FORWARD) == list(range(num_microbatches))
        assert microbatches(steps, Direction.BACKWARD) == []


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_each_microbatch_goes_forward_and_backward_once_in_order(num_stages: int, num_microbatches: int) -> None:
    for steps in pipeline(num_stages, num_microbatches):
        assert microbatches(steps, Direction.FORWARD) == list(range(num_microbatches))
        assert microbatches(steps, Direction.BACKWARD) == list(range(num_microbatches))
        for microbatch in range(num_microbatches):
            assert steps.index(Forward(microbatch)) < steps.index(Backward(microbatch))


def test_one_forward_one_backward_of_four_stages() -> None:
    def order(stage: int) -> str:
        return " ".join(map(repr, one_forward_one_backward(stage, 4, 6)))

    assert order(0) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5"
    assert order(2) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5"
    assert order(3) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"
    assert list(forward_only(2)) == [Forward(0), Forward(1)]


def test_a_single_stage_exchanges_nothing() -> None:
    assert stage_steps(0, 1, 2) == [Forward(0), Backward(0), Forward(1), Backward(1)]


def test_steady_state_sends_and_receives_in_one_exchange() -> None:
    middle = stage_steps(1, 3, 4)
    after_forward = middle[middle.index(Forward(2)) + 1]
    assert after_forward == Exchange(
        (Transfer(True, Direction.FORWARD, 2, peer=2), Transfer(False, Direction.BACKWARD, 1, peer=2))
    )


def without(steps: list[Step], transfer: Transfer) -> list[Step]:
    """`steps` in which one transfer was forgotten."""
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, Exchange):
            step = Exchange(tuple(t for t in step.transfers if t != transfer))
        if step != Exchange(()):
            kept.append(step)
    assert kept != steps
    return kept


@pytest.mark.parametrize("is_send", [True, False])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.BACKWARD])
@pytest.mark.parametrize("microbatch", [0, 2, 4])
def test_a_forgotten_transfer_is_refused(is_send: bool, direction: Direction, microbatch: int) -> None:
    stages = pipeline(3, 5)
    peer = 2 if (direction is Direction.FORWARD) == is_send else 0
    stages[1] = without(stages[1], Transfer(is_send, direction, microbatch, peer))
    with pytest.raises(RuntimeError, match="does not complete|before it has received its input"):
        simulate(stages)


def test_a_transfer_forgotten_on_both_sides_is_refused() -> None:
    stages = pipeline(2, 3)
    stages[0] = without(stages[0], Transfer(True, Direction.FORWARD, 1, peer=1))
    stages[1] = without(stages[1], Transfer(False, Direction.FORWARD, 1, peer=0))
    with pytest.raises(RuntimeError, match="stage 1 runs F1 before it has received its input"):
        simulate(stages)


def test_stages_that_disagree_about_the_order_are_refused() -> None:
    first = [Forward(0), Forward(1), Backward(0), Backward(1)]
    swapped = [Forward(1), Backward(1), Forward(0), Backward(0)]
    with pytest.raises(RuntimeError, match=r"does not complete: stages wait at \{0: .*, 1: "):
        simulate([with_transfers(first, 0, 2), with_transfers(swapped, 1, 2)])
    assert simulate([with_transfers(first, 0, 2), with_transfers(first, 1, 2)]) == [2, 2]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ([Backward(0), Forward(0)], "stage 0 runs B0 before its forward"),
        ([Forward(0), Forward(0), Backward(0)], "stage 0 runs F0 twice"),
        ([Forward(0), Backward(0), Backward(0)], "stage 0 runs B0 twice"),
        ([Forward(0), Forward(1), Backward(1)], r"live microbatches \{0: \[0\]\}"),
    ],
)
def test_work_that_makes_no_sense_is_refused(work: list[Compute], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        simulate([with_transfers(work, 0, 1)])


def test_sending_before_computing_is_refused() -> None:
    send = Transfer(True, Direction.FORWARD, 0, peer=1)
    receive = Transfer(False, Direction.FORWARD, 0, peer=0)
    with pytest.raises(RuntimeError, match="stage 0 sends .* before it is computed"):
        simulate([[Exchange((send,)), Forward(0)], [Exchange((receive,)), Forward(0)]])


def test_a_peer_that_does_not_exist_is_never_met() -> None:
    with pytest.raises(RuntimeError, match="stages wait at"):
        simulate([[Forward(0), Exchange((Transfer(True, Direction.FORWARD, 0, peer=1),))]])
