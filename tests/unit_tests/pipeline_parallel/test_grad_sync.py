"""When the traffic of a chunk's gradients and weights is let go: what is called, in which order, on each rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from megatron.core.pipeline_parallel.grad_sync import GradientSync
from megatron.core.pipeline_parallel.schedule import Compute, Kind

F, B = Kind.FORWARD, Kind.BACKWARD
ONE_CHUNK = [Compute(F, 0, 0), Compute(F, 1, 0), Compute(B, 0, 0), Compute(B, 1, 0)]
TWO_CHUNKS = [
    *(Compute(F, m, chunk) for chunk in (0, 1) for m in (0, 1)),
    *(Compute(B, m, chunk) for chunk in (1, 0) for m in (0, 1)),
]
SPLIT = [Compute(F, 0, 0), Compute(F, 1, 0)] + [
    Compute(kind, m, 0) for m in (0, 1) for kind in (Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
]


def run(
    steps: list[Compute], rank: int = 0, *, num_chunks: int = 1, grads: bool = False, params: bool = False
) -> list[str]:
    """The order of computations (F0.1: forward of microbatch 0 in chunk 1) and of what is let go around them."""
    events: list[str] = []

    @contextmanager
    def holding_back(chunk: int) -> Iterator[None]:
        events.append(f"hold {chunk}")
        yield
        events.append(f"release {chunk}")

    def each(function: Callable[..., Any]) -> list[Callable[..., Any]]:
        return [partial(function, chunk) for chunk in range(num_chunks)]

    config = SimpleNamespace(
        no_sync_func=each(holding_back),
        grad_sync_func=each(lambda chunk, params: events.append(f"reduce {chunk}")) if grads else None,
        param_sync_func=each(lambda chunk, params: events.append(f"gather {chunk}")) if params else None,
        defer_embedding_wgrad_compute=False,
    )
    chunks = [nn.Linear(1, 1) for _ in range(num_chunks)]
    with GradientSync(config, chunks, list(steps), rank) as sync:
        for step in steps:
            sync.before(step)
            events.append(f"{step.kind.name[0]}{step.microbatch}.{step.chunk}")
            sync.after(step)
    return events


def test_gradients_are_held_back_until_the_last_backward() -> None:
    assert run(ONE_CHUNK) == ["hold 0", "F0.0", "F1.0", "B0.0", "release 0", "B1.0"]


def test_each_chunk_is_released_before_its_own_last_backward() -> None:
    events = run(TWO_CHUNKS, num_chunks=2)
    assert events[:2] == ["hold 0", "hold 1"]
    for chunk in (0, 1):
        assert events.index(f"release {chunk}") + 1 == events.index(f"B1.{chunk}")


def test_a_split_backward_is_released_before_the_last_gradient_of_an_input() -> None:
    assert run(SPLIT)[-4:] == ["W0.0", "release 0", "I1.0", "W1.0"]


def test_one_context_for_all_chunks_is_left_before_the_last_backward_of_any() -> None:
    events: list[str] = []

    @contextmanager
    def holding_back() -> Iterator[None]:
        yield
        events.append("release")

    config = SimpleNamespace(no_sync_func=holding_back, grad_sync_func=None, param_sync_func=None)
    with GradientSync(config, [nn.Linear(1, 1)] * 2, list(TWO_CHUNKS), 0) as sync:
        for step in TWO_CHUNKS:
            sync.before(step)
            events.append(f"{step.kind.name[0]}{step.microbatch}.{step.chunk}")
    assert events[-2:] == ["release", "B1.0"] and events.count("release") == 1


@pytest.mark.parametrize(
    "rank, last",
    [(1, ["B0.0", "reduce 1", "B1.0", "release 0", "release 1", "reduce 0"]), (3, ["reduce 0", "reduce 1"])],
)
def test_later_ranks_reduce_when_the_first_one_does(rank: int, last: list[str]) -> None:
    """Rank p waits for p backwards after a chunk's last one; what would come after the step comes at its end."""
    events = run(TWO_CHUNKS, rank, num_chunks=2, grads=True)
    assert events[-len(last) :] == last
    assert "reduce 0" not in run(TWO_CHUNKS, 0, num_chunks=2, grads=True)  # released instead, as above


def test_reductions_wait_for_the_gradients_of_weights() -> None:
    assert run(SPLIT, 1, grads=True)[-3:] == ["W1.0", "release 0", "reduce 0"]


def test_weights_of_further_chunks_are_gathered_one_chunk_ahead() -> None:
    steps = [Compute(F, m, chunk) for chunk in range(4) for m in (0, 1)]
    steps += [Compute(B, m, chunk) for chunk in reversed(range(4)) for m in (0, 1)]
    events = run(steps, num_chunks=4, params=True)
    assert events[4:6] == ["gather 0", "gather 1"]
    assert events.index("gather 2") + 1 == events.index("F0.1")
    assert events.index("gather 3") + 1 == events.index("F0.2")
    later = run(steps, 1, num_chunks=4, params=True)
    assert later.index("gather 2") + 1 == later.index("F1.0")  # one forward earlier


def test_evaluation_gathers_and_reduces_nothing() -> None:
    forwards = [step for step in TWO_CHUNKS if step.kind is F]
    events = run(forwards, 1, num_chunks=2, grads=True, params=True)
    assert not [event for event in events if event.split()[0] in ("gather", "reduce")]


def test_an_error_reduces_nothing() -> None:
    reduced: list[int] = []
    config = SimpleNamespace(no_sync_func=None, grad_sync_func=lambda params: reduced.append(1), param_sync_func=None)
    with pytest.raises(RuntimeError, match="in backward"), GradientSync(config, [nn.Linear(1, 1)], ONE_CHUNK, 1):
        raise RuntimeError("in backward")
    assert not reduced


def test_functions_for_another_number_of_chunks_are_refused() -> None:
    config = SimpleNamespace(no_sync_func=[None], grad_sync_func=None, param_sync_func=None)
    with pytest.raises(ValueError, match="1 functions for 2 model chunks"):
        GradientSync(config, [nn.Linear(1, 1)] * 2, [], 0)
