"""Random streams across tensor parallel ranks, and recomputation that draws the same numbers twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core import device, parallel_state
from megatron.core.tensor_parallel import random as rng
from megatron.core.tensor_parallel.random import (
    CudaRNGStatesTracker,
    checkpoint,
    get_cuda_rng_tracker,
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from tests.worker_pool import run_ranks

SEED = 77


@pytest.fixture(autouse=True)
def fresh_generators() -> Iterator[None]:
    state, device_state = torch.get_rng_state(), device.default_rng_state()
    model_parallel_cuda_manual_seed(SEED)
    yield
    initialize_rng_tracker(force_reset=True)
    torch.set_rng_state(state)
    device.set_default_rng_state(device_state)


def draw(count: int = 4) -> list[float]:
    return torch.rand(count, device=device.current_device()).tolist()


def draws_from(seed: int, count: int = 4) -> list[float]:
    generator = torch.Generator(device.current_device()).manual_seed(seed)
    return torch.rand(count, device=device.current_device(), generator=generator).tolist()


def draw_from_all_streams() -> dict[str, list[float]]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(SEED)
    tracker = get_cuda_rng_tracker()
    drawn = {"default": draw()}
    for name in ("model-parallel-rng", "data-parallel-rng", "expert-parallel-rng"):
        with tracker.fork(name):
            drawn[name] = draw()
    return drawn


def test_streams_of_four_ranks() -> None:
    """tp 2 × dp 2, experts tp 2 × ep 2."""
    ranks = run_ranks(4, draw_from_all_streams)
    for rank, drawn in enumerate(ranks):
        tp_rank, ep_rank = rank % 2, rank // 2
        assert drawn["default"] == drawn["data-parallel-rng"] == draws_from(SEED)
        assert drawn["model-parallel-rng"] == draws_from(SEED + 2718 + tp_rank)
        assert drawn["expert-parallel-rng"] == draws_from(SEED + 1024 + 100 * ep_rank + tp_rank)
    assert ranks[0]["model-parallel-rng"] != ranks[1]["model-parallel-rng"]
    assert len({tuple(drawn["expert-parallel-rng"]) for drawn in ranks}) == 4


def test_streams_of_given_ranks() -> None:
    model_parallel_cuda_manual_seed(SEED, tp_rank=3, ep_rank=2, etp_rank=1)
    with get_cuda_rng_tracker().fork():
        assert draw() == draws_from(SEED + 2718 + 3)
    with get_cuda_rng_tracker().fork(rng.get_expert_parallel_rng_tracker_name()):
        assert draw() == draws_from(SEED + 1024 + 200 + 1)


def test_fork_leaves_the_outside_alone_and_continues_its_stream() -> None:
    outside, inside = draws_from(SEED, 4), draws_from(SEED + 2718, 8)
    tracker = get_cuda_rng_tracker()
    assert draw(2) == outside[:2]
    with tracker.fork():
        assert draw(4) == inside[:4]
    with tracker.fork():
        assert draw(4) == inside[4:]
    assert draw(2) == outside[2:]


def test_fork_may_be_nested() -> None:
    tracker = get_cuda_rng_tracker()
    with tracker.fork():
        first = draw(2)
        with tracker.fork("expert-parallel-rng"):
            assert draw(2) == draws_from(SEED + 1024, 2)
        assert first + draw(2) == draws_from(SEED + 2718, 4)


def test_an_exception_inside_fork_restores_the_outside() -> None:
    with pytest.raises(KeyError), get_cuda_rng_tracker().fork():
        draw()
        raise KeyError
    assert draw() == draws_from(SEED)


def test_states_can_be_saved_and_restored() -> None:
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    with tracker.fork():
        first = draw()
    tracker.set_states(states)
    with tracker.fork():
        assert draw() == first


def test_all_states_can_be_saved_and_restored() -> None:
    def everything() -> list[float]:
        with get_cuda_rng_tracker().fork():
            tracked = draw()
        return tracked + draw() + torch.rand(2).tolist()

    states = rng.get_all_rng_states()
    first = everything()
    assert everything() != first
    rng.set_all_rng_states(states)
    assert everything() == first


def test_two_streams_may_share_neither_name_nor_seed() -> None:
    tracker = CudaRNGStatesTracker()
    assert not tracker.is_initialized()
    tracker.add("a", 1)
    assert tracker.is_initialized()
    with pytest.raises(ValueError, match="'a' exists already"):
        tracker.add("a", 2)
    with pytest.raises(ValueError, match="seed 1 is already used"):
        tracker.add("b", 1)
    tracker.reset()
    tracker.add("a", 1)


def test_unknown_streams_are_refused() -> None:
    with (
        pytest.raises(RuntimeError, match="no random stream 'x': call .*model_parallel_cuda_manual_seed"),
        CudaRNGStatesTracker().fork("x"),
    ):
        pass


def test_adding_a_stream_leaves_the_outside_alone() -> None:
    get_cuda_rng_tracker().add("another", 5)
    assert draw() == draws_from(SEED)


def test_an_inference_tracker_does_not_fork() -> None:
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    with get_cuda_rng_tracker(inference_rng_tracker=True).fork("any name"):
        first = draw(2)
    assert first + draw(2) == draws_from(SEED, 4)


@pytest.mark.parametrize("option", ["use_te_rng_tracker", "use_cudagraphable_rng"])
def test_trackers_that_are_not_built_are_refused(option: str) -> None:
    with pytest.raises(NotImplementedError, match=option):
        initialize_rng_tracker(**{option: True}, force_reset=True)


# --- recomputation ---


def run_directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def run_recomputed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, False, *args)


def run_distributed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, True, *args)


class Block(nn.Module):
    """Dropout from the default stream and from the one that differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, probability: float = 0.3, mask: Tensor | None = None) -> Tensor:
        with get_cuda_rng_tracker().fork():
            hidden = F.dropout(F.gelu(self.fc1(x)), probability)
        out = F.dropout(self.fc2(hidden), probability)
        return out if mask is None else out.masked_fill(mask, 0.0)


def outcome(run: Callable[..., Any], *args: Any) -> list[Tensor]:
    """Output, gradients, and what the generators give afterwards."""
    model_parallel_cuda_manual_seed(SEED)
    block = Block()
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out = run(block, x, *args)
    after_forward = torch.tensor(draw())
    (out.square() * torch.arange(6.0)).sum().backward()
    after_backward = torch.tensor(draw())
    with get_cuda_rng_tracker().fork():
        stream = torch.tensor(draw())
    grads = [param.grad for param in block.parameters()]
    return [out.detach(), x.grad, *grads, after_forward, after_backward, stream]


def assert_bitwise_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_recomputation_changes_nothing() -> None:
    assert_bitwise_equal(outcome(run_recomputed), outcome(run_directly))


def test_recomputation_with_other_arguments() -> None:
    mask = torch.rand(4, 3, 6) < 0.3
    for args in ((0.5, mask), (0.0, None), (0.5,)):
        assert_bitwise_equal(outcome(run_recomputed, *args), outcome(run_directly, *args))


def test_recomputation_inside_recomputation() -> None:
    def twice(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda block, x: run(lambda y: run(block, run(block, y)) + y, x)

    assert_bitwise_equal(outcome(twice(run_recomputed)), outcome(twice(run_directly)))


def test_several_outputs_of_which_some_are_unused_or_not_differentiable() -> None:
    def function(x: Tensor, scale: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.dropout(x, 0.4) * scale, (x * 10).long(), x * y

    results = []
    for run in (run_directly, run_recomputed):
        model_parallel_cuda_manual_seed(SEED)
        x, y = torch.linspace(-1, 1, 8).requires_grad_(), torch.full((8,), 2.0)
        first, whole, unused = run(function, x, 3.0, y)
        assert not whole.requires_grad
        assert unused.requires_grad
        (first * whole).sum().backward()
        assert y.grad is None
        results.append([first.detach(), whole, unused.detach(), x.grad])
    assert_bitwise_equal(results[1], results[0])


def stored_elements(run: Callable[..., Any]) -> int:
    """Elements that backward keeps alive."""
    block, x = Block(), torch.randn(4, 3, 6, requires_grad=True)
    stored: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run(block, x)
    assert out.requires_grad
    return sum(stored.values())


def test_only_the_input_is_stored() -> None:
    assert stored_elements(run_recomputed) == 4 * 3 * 6
    assert stored_elements(run_directly) > 4 * 3 * 6


def check_distributed() -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    assert_bitwise_equal(outcome(run_distributed), outcome(run_directly))
    assert stored_elements(run_distributed) == 4 * 3 * 6 // 2
    with pytest.raises(ValueError, match="5 is not divisible by 2"):
        checkpoint(torch.sin, True, torch.ones(5, requires_grad=True))


def test_stored_input_may_be_shared_out_over_tensor_ranks() -> None:
    run_ranks(2, check_distributed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recomputation_under_autocast_uses_its_dtype(dtype: torch.dtype) -> None:
    def under_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
        def run_block(block: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast(device.device_type(), dtype=dtype):
                return run(block, x).float()

        return run_block

    assert_bitwise_equal(outcome(under_autocast(run_recomputed)), outcome(under_autocast(run_directly)))
