"""What overlaps in the backward pass of the parallel linear layers, and where weight gradients go."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core import collectives, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gemm,
    model_parallel_cuda_manual_seed,
    overlap,
)
from megatron.core.tensor_parallel.gemm import add_product, weight_gradient
from megatron.core.tensor_parallel.weight_grad_queue import WeightGradQueue, deferring_weight_grads
from megatron.core.utils import init_method_normal
from tests.worker_pool import run_ranks


def come_late(what: str) -> None:
    """Wait until rank 0 lets this rank go on, which it does while it is at `what`."""
    dist.distributed_c10d._get_default_store().wait([f"at {what}"])


def let_go_on(what: str) -> None:
    """Rank 0 is at `what`."""
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().set(f"at {what}", "")


class Watched:
    """A collective's handle that tells when it is waited for."""

    def __init__(self, name: str, work: Any, log: list[str]) -> None:
        self.name, self.work, self.log = name, work, log

    def wait(self) -> None:
        self.work.wait()
        self.log.append(f"{self.name} has arrived")


def check_order_of_backward(sequence_parallel: bool, monkeypatch_last: str) -> list[str]:
    """What rank 0 did when, in a backward pass to which the other rank comes late."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = ModelParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    layer = ColumnParallelLinear(8, 12, config=config, init_method=init_method_normal(0.3), bias=False)
    x = torch.randn(4, 2, 8, requires_grad=True)
    output, _ = layer(x)
    log: list[str] = []
    works: list[Any] = []

    def watch(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def launch(*args: Any, **kwargs: Any) -> Any:
            if label == monkeypatch_last and dist.get_rank() == 1:
                come_late("product")
            work = original(*args, **kwargs)
            if not kwargs.get("async_op"):
                return work
            log.append(f"{label} launched")
            works.append(work)
            return Watched(label, work, log)

        setattr(owner, name, launch)
        undo.append((owner, name, original))

    undo: list[tuple[Any, str, Any]] = []
    watch(dist, "all_reduce", "dx")
    watch(collectives, "_reduce_scatter", "dx")
    watch(collectives, "_all_gather", "x")
    original = gemm.weight_gradient

    def weight_gradient_noted(*args: Any) -> Tensor | None:
        log.append(f"dW computed, dx in flight: {not works[-1].is_completed()}")
        let_go_on("product")
        return original(*args)

    gemm.weight_gradient = weight_gradient_noted
    undo.append((gemm, "weight_gradient", original))
    try:
        output.sum().backward()
    finally:
        for owner, name, function in undo:
            setattr(owner, name, function)
    return log


def test_input_gradient_travels_while_the_weight_gradient_is_computed() -> None:
    log, _ = run_ranks(2, check_order_of_backward, False, "dx")
    assert log == ["dx launched", "dW computed, dx in flight: True", "dx has arrived"]


def test_sequence_parallel_exchanges_overlap_with_both_products() -> None:
    log, _ = run_ranks(2, check_order_of_backward, True, "dx")
    assert log == [
        "x launched",
        "dx launched",
        "x has arrived",
        "dW computed, dx in flight: True",
        "dx has arrived",
    ]


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that an operation inside allocates."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("total_dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_without_a_tensor_of_their_own(
    dtype: torch.dtype, total_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "_PIECE", 64)
    weight = nn.Parameter(torch.zeros(96, 16, dtype=dtype))
    weight.main_grad = torch.full((96, 16), 2.0, dtype=total_dtype)
    dy, x = torch.randn(6, 4, 96).to(dtype), torch.randn(6, 4, 16).to(dtype)
    with LargestResult() as sizes:
        assert weight_gradient(weight, dy, x, accumulate=True) is None
    widened = dtype is torch.float16  # computed in fp32 on a CPU
    assert sizes.largest <= (dy.numel() if widened else 64)
    expected = 2 + dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-2, atol=0.1)
    alone = weight_gradient(weight, dy, x, accumulate=False)
    torch.testing.assert_close(alone.double(), expected - 2, rtol=1e-2, atol=0.1)


def test_a_product_in_pieces_is_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_PIECE", 40)
    a, b = torch.randn(7, 5).bfloat16(), torch.randn(5, 16).bfloat16()
    total = torch.randn(7, 16)
    expected = total + (a @ b).float()
    add_product(total, a, b)
    torch.testing.assert_close(total, expected)


class Tied(nn.Module):
    """A table that is looked up, multiplied with, and used by a plain torch function too."""

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(16, 8, config=config, init_method=init_method_normal(0.5))
        self.out = ColumnParallelLinear(
            8,
            16,
            config=config,
            init_method=init_method_normal(0.5),
            bias=False,
            skip_weight_param_allocation=True,
        )

    def forward(self, ids: Tensor) -> Tensor:
        logits, _ = self.out(self.embed(ids), weight=self.embed.weight)
        return logits + F.linear(self.embed(ids), self.embed.weight)


def check_tied_weights(fused: bool) -> list[float]:
    config = ModelParallelConfig(gradient_accumulation_fusion=fused)
    config.calculate_per_token_loss = False
    torch.manual_seed(0)
    module = Tied(config)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)
    calls: list[bool] = []
    module.embed.weight.register_post_accumulate_grad_hook(lambda param: calls.append(param.grad is None))
    table = module.embed.weight.detach().clone().requires_grad_()
    ids = torch.randint(0, 16, (3, 4), generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # microbatches
        model(ids).square().sum().backward()
        looked_up = F.embedding(ids, table)
        (2 * F.linear(looked_up, table)).square().sum().backward()
    torch.testing.assert_close(module.embed.weight.main_grad, table.grad)
    assert len(calls) == 2  # once for each backward pass, whichever way the gradients came
    assert module.embed.weight.grad is None
    return module.embed.weight.main_grad.flatten().tolist()


def test_a_fused_and_an_ordinary_gradient_of_one_weight_add_up() -> None:
    assert check_tied_weights(True) == pytest.approx(check_tied_weights(False), rel=1e-5)


def test_a_weight_without_gradient_fetches_nothing() -> None:
    run_ranks(2, check_frozen_weight)


def check_frozen_weight() -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = ModelParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    layer = ColumnParallelLinear(8, 12, config=config, init_method=init_method_normal(0.3), bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 2, 8, requires_grad=True)
    output, _ = layer(x)
    original, collectives._all_gather = collectives._all_gather, None
    try:
        output.sum().backward()
    finally:
        collectives._all_gather = original
    whole = layer.weight.sum(0)
    dist.all_reduce(whole)
    torch.testing.assert_close(x.grad, whole.expand(4, 2, 8))


# --- communication in pieces (tp_comm_overlap) ---

PLANS: dict[str, dict[str, bool]] = {
    "all pieces": {"tp_comm_overlap_rs_dgrad": True},
    "default": {},
    "no gather": {"tp_comm_overlap_ag": False},
    "no scatter": {"tp_comm_overlap_rs": False},
    "older spellings": {"tp_comm_split_ag": False, "tp_comm_split_rs": False},
    "nothing behind gradients": {"tp_comm_bulk_dgrad": False, "tp_comm_bulk_wgrad": False},
}


def run_two_layers(tp: int, fused: bool, split: bool = False, **overlap: bool) -> list[Tensor]:
    """Output and gradients of a column-parallel and a row-parallel layer, one after the other."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=tp, sequence_parallel=True, gradient_accumulation_fusion=fused, **overlap
    )
    model_parallel_cuda_manual_seed(123)
    common = {"config": config, "init_method": init_method_normal(0.3), "bias": True, "skip_bias_add": False}
    first = ColumnParallelLinear(8, 16, tp_comm_buffer_name="fc1", **common)
    second = RowParallelLinear(16, 8, input_is_parallel=True, tp_comm_buffer_name="fc2", **common)
    assert (first.overlap is not None) == (second.overlap is not None) == config.tp_comm_overlap
    for layer in (first, second):
        if fused:
            layer.weight.main_grad = torch.ones_like(layer.weight)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(3, 2, 8, requires_grad=True)
    y, _ = second(first(x)[0].relu())
    queue = WeightGradQueue()
    with deferring_weight_grads(queue) if split else contextlib.nullcontext():
        (y * torch.randn(3, 2, 8)).sum().backward()
    assert len(queue) == (2 if split else 0)
    queue.run()
    weights = [layer.weight.main_grad if fused else layer.weight.grad for layer in (first, second)]
    return [y, x.grad, *weights, first.bias.grad, second.bias.grad]


def check_pieces(tp: int) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    for fused in (False, True):
        expected = run_two_layers(tp, fused)
        for name, plan in PLANS.items():
            found = run_two_layers(tp, fused, tp_comm_overlap=True, **plan)
            torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(run_two_layers(tp, fused, split=True, tp_comm_overlap=True), expected)


@pytest.mark.parametrize("tp", [2, 4])
def test_communication_in_pieces_changes_nothing(tp: int) -> None:
    run_ranks(tp, check_pieces, tp)


def check_rings_overlap() -> tuple[list[bool], list[bool]]:
    """Whether a piece was on its way during each product but the last, for the gathering and the scattering ring."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    rank = dist.get_rank()
    seen: list[bool] = []
    phase = "gathering"
    original_pass, original_into, original = overlap._pass_on, overlap.matmul_into, overlap.matmul
    works: list[Any] = []

    def pass_on(x: Tensor, group: Any) -> Any:
        if rank == 1:
            come_late(phase)  # the neighbour's piece cannot have come before this rank posts it
        flight = original_pass(x, group)
        works.append(flight.work.works[-1])
        return flight

    def note(product: Any) -> Any:
        def noted(*args: Any) -> Any:
            seen.append(bool(works) and not works[-1].is_completed())
            if seen[-1] and rank == 0:
                let_go_on(phase)
            return product(*args)

        return noted

    overlap._pass_on = pass_on
    overlap.matmul_into, overlap.matmul = note(original_into), note(original)
    try:
        x, matrix = torch.randn(4, 2, 8), torch.randn(8, 6)
        overlap.gather_and_multiply(x, matrix, group)
        gathering, phase = list(seen), "scattering"
        seen.clear()
        works.clear()
        overlap.multiply_and_reduce_scatter(x, matrix, group)
        return gathering, list(seen)
    finally:
        overlap._pass_on, overlap.matmul_into, overlap.matmul = original_pass, original_into, original


def test_pieces_travel_during_products() -> None:
    gathering, scattering = run_ranks(2, check_rings_overlap)[0]
    assert gathering[0]  # while its own piece is multiplied
    assert scattering[1]  # while the second part is multiplied, the first is on its way
