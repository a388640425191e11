"""Captured layers with a recorder that works on any device: what is captured when, copied where, and added to what."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.distributed_data_parallel import _add_to_main_grad
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.cuda_graphs import CapturedPass, CudaGraphManager, CudaRecorder
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.transformer.tape import Tape
from tests.worker_pool import run_ranks

LENGTH, BATCH, HIDDEN, LAYERS = 8, 2, 32, 2


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", Tape)
    monkeypatch.setattr(Tape, "kept", [])
    monkeypatch.setattr(Tape, "log", [])
    monkeypatch.setattr(Tape, "recorded", 0)


def settings(**values: Any) -> TransformerConfig:
    given = {"num_layers": LAYERS, "hidden_dropout": 0.0, "attention_dropout": 0.0} | values
    return TransformerConfig(hidden_size=HIDDEN, num_attention_heads=4, **given)


def build(graphs: bool, **values: Any) -> GPTModel:
    model_parallel_cuda_manual_seed(1234)
    config = settings(enable_cuda_graph=graphs, cuda_graph_warmup_steps=1, **values)
    return GPTModel(config, get_gpt_layer_local_spec(), 64, LENGTH, position_embedding_type="rope")


def batch(number: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, 64, (BATCH, length + 1), generator=torch.Generator().manual_seed(number))
    return ids[:, :-1], torch.arange(length).expand(BATCH, -1), ids[:, 1:]


def loss_of(model: nn.Module, number: int, length: int = LENGTH) -> Tensor:
    ids, positions, labels = batch(number, length)
    return model(ids, positions, None, labels=labels).mean()


def step(model: nn.Module, numbers: list[int]) -> list[Tensor]:
    """Losses; gradients are added up."""
    losses = []
    for number in numbers:
        loss = loss_of(model, number)
        loss.backward()
        losses.append(loss.detach())
    return losses


def test_the_same_numbers_over_several_microbatches() -> None:
    plain, graphed = build(False), build(True)
    expected, found = step(plain, [1, 2, 3, 4]), step(graphed, [1, 2, 3, 4])
    assert Tape.recorded == 2 * LAYERS  # forward and backward of each layer, once
    assert Tape.log == ["forward 1", "forward 3", "backward 4", "backward 2"] * 3
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for (name, a), b in zip(graphed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
    assert list(graphed.state_dict()) == list(plain.state_dict())


def hybrid(graphs: bool) -> MambaModel:
    model_parallel_cuda_manual_seed(1234)
    sizes = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2, "gated_linear_unit": True}
    config = settings(enable_cuda_graph=graphs, cuda_graph_warmup_steps=1, is_hybrid_model=True, num_layers=4, **sizes)
    return MambaModel(config, mamba_stack_spec, 64, LENGTH, hybrid_override_pattern="M-*-")


def test_layers_of_a_hybrid() -> None:
    plain, graphed = hybrid(False), hybrid(True)
    torch.testing.assert_close(step(graphed, [1, 2, 3]), step(plain, [1, 2, 3]), rtol=0, atol=0)
    assert Tape.recorded == 2 * 4
    for (name, a), b in zip(graphed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_main_grads_are_added_once_in_each_replay(fused: bool) -> None:
    totals = []
    for graphs in (False, True):
        model = build(graphs, gradient_accumulation_fusion=fused)
        for param in model.parameters():
            param.main_grad = torch.zeros_like(param)  # type: ignore[attr-defined]
            param.register_post_accumulate_grad_hook(_add_to_main_grad)
        Tape.kept = [param.main_grad for param in model.parameters()]  # type: ignore[attr-defined]
        step(model, [1, 2, 3])
        totals.append(Tape.kept)
        assert all(param.grad is None for param in model.parameters())
    assert Tape.recorded == 2 * LAYERS
    torch.testing.assert_close(totals[1], totals[0], rtol=0, atol=0)


def train_in_buckets(graphs: bool) -> tuple[list[Tensor], int]:
    """Gradients after two steps of three micro-batches with reduction in many buckets, overlapped."""
    parallel_state.initialize_model_parallel()
    Tape.recorded = 0
    with mock.patch.object(cuda_graphs, "CudaRecorder", Tape):
        model = build(graphs, gradient_accumulation_fusion=True)
    options = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1000, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, options, model)
    Tape.kept = [param.main_grad for param in model.parameters()]  # type: ignore[attr-defined]
    for _ in range(2):
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            step(wrapped, [1, 2])
        step(wrapped, [3])
        wrapped.finish_grad_sync()
    return [total.clone() for total in Tape.kept], Tape.recorded


def test_gradients_are_reduced_while_backward_replays() -> None:
    ((expected, none),) = run_ranks(1, train_in_buckets, False)
    ((found, recorded),) = run_ranks(1, train_in_buckets, True)
    assert (none, recorded) == (0, 2 * LAYERS) and len(expected) > 10
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_microbatches_in_flight_have_passes_of_their_own() -> None:
    results = []
    for graphs in (False, True):
        model = build(graphs)
        step(model, [1])
        first, second = loss_of(model, 2), loss_of(model, 3)
        first.backward()
        third = loss_of(model, 4)
        second.backward()
        third.backward()
        results.append([param.grad for param in model.parameters()])
    assert Tape.recorded == 2 * 2 * LAYERS  # two at a time
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_forward_without_backward_gives_its_pass_back() -> None:
    model = build(True)
    step(model, [1, 2])
    loss = loss_of(model, 3)
    del loss
    gc.collect()
    step(model, [4])
    assert Tape.recorded == 2 * LAYERS


def test_weights_may_change_in_place_between_replays() -> None:
    results = []
    for graphs in (False, True):
        model = build(graphs)
        for number in range(1, 5):
            step(model, [number])
            with torch.no_grad():
                for param in model.parameters():
                    param -= 0.1 * param.grad
                    param.grad = None
        results.append(list(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_other_shapes_have_passes_of_their_own_and_evaluation_none() -> None:
    plain, graphed = build(False), build(True)
    step(graphed, [1, 2])
    assert Tape.recorded == 2 * LAYERS
    torch.testing.assert_close(loss_of(graphed, 3, length=4), loss_of(plain, 3, length=4), rtol=0, atol=0)
    assert Tape.recorded == 4 * LAYERS
    log = len(Tape.log)
    with torch.no_grad():
        loss_of(graphed, 3, length=6)
    graphed.eval()
    torch.testing.assert_close(loss_of(graphed, 4), loss_of(plain, 4), rtol=0, atol=0)
    assert Tape.recorded == 4 * LAYERS and len(Tape.log) == log


def test_captured_after_so_many_backward_passes() -> None:
    model = build(True)
    model.config.cuda_graph_warmup_steps = 3
    for number in range(1, 4):
        loss_of(model, number)  # forward alone warms nothing
        step(model, [number])
        assert Tape.recorded == 0
    step(model, [4])
    assert Tape.recorded == 2 * LAYERS


def double(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def test_a_pass_copies_what_goes_in_and_lends_what_comes_out() -> None:
    weight = torch.full((3,), 2.0, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    captured = CapturedPass(double, [x], [weight], Tape())
    assert captured.output.isnan().all() and not captured.busy
    y = captured(x)
    assert y.data_ptr() == captured.output.data_ptr() and y._base is None and captured.busy
    assert captured.inputs[0].data_ptr() != x.data_ptr()
    y.backward(torch.full((3,), 5.0), retain_graph=True)
    assert not captured.busy
    assert torch.equal(x.grad, torch.full((3,), 10.0)) and torch.equal(weight.grad, torch.full((3,), 5.0))
    held = x.grad
    captured(3 * x).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 8.0))
    assert held is x.grad and torch.equal(x.grad, torch.full((3,), 16.0))  # 10 + 2 * 3
    with pytest.raises(RuntimeError, match="has one backward for each forward"):
        y.backward(torch.ones(3))


class Block(nn.Module):
    """Takes and returns what a layer with cross attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(
        self, x: Tensor, *, context: Tensor | None, pair: tuple[Tensor, Tensor] | None, scale: float = 1.0
    ) -> Any:
        y = x * self.weight
        if pair is not None:
            y = y * pair[0] + pair[1]
        return (y if context is None else y * context), context


def test_arguments_of_all_kinds() -> None:
    block = Block()
    manager = CudaGraphManager(settings(cuda_graph_warmup_steps=1), recorder=Tape)
    for number in range(3):
        x, context = (torch.full((3,), value + number, requires_grad=True) for value in (1.0, 2.0))
        pair = (torch.full((3,), 3.0 + number), torch.ones(3))
        y, same = manager(block, (x,), {"context": context, "pair": pair, "scale": 1.0})
        assert same is context
        y.sum().backward()
        assert torch.equal(y, (x * pair[0] + 1) * context)
        assert torch.equal(x.grad, pair[0] * context) and torch.equal(context.grad, x * pair[0] + 1)
    assert Tape.recorded == 2
    y, _ = manager(block, (x,), {"context": None, "pair": None, "scale": 1.0})
    assert torch.equal(y, x) and Tape.recorded == 4
    packed = PackedSeqParams.from_documents(torch.zeros(1, 4, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="takes tensors and plain values: packed is a PackedSeqParams"):
        manager(block, (x,), {"context": None, "packed": packed})


def test_recorded_are_other_parameters_in_the_same_memory() -> None:
    block = Block()
    block.weight.main_grad = torch.zeros(3)  # type: ignore[assignment]
    manager = CudaGraphManager(settings(cuda_graph_warmup_steps=1), recorder=Tape)
    seen: list[Any] = []
    block.register_forward_hook(lambda module, args, result: seen.append(module.weight))
    weight: Any = block.weight
    for _ in range(2):
        manager(block, (torch.ones(3),), {"context": None, "pair": None})[0].sum().backward()
    warming, recorded, *_ = seen
    assert warming is weight and recorded is not weight and block.weight is weight
    assert recorded.data_ptr() == weight.data_ptr() and recorded.main_grad is weight.main_grad
    assert isinstance(recorded, nn.Parameter) and recorded.requires_grad and recorded.grad is None
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_weights_are_waited_for_before_a_replay() -> None:
    model = build(True)
    step(model, [1, 2])
    Tape.log.clear()
    part: Any = model.decoder.layers[1].mlp  # type: ignore[union-attr]
    part.linear_fc1.register_forward_pre_hook(lambda module, args: Tape.log.append("waited"))
    step(model, [3])
    assert Tape.log[:3] == ["forward 1", "waited", "forward 3"]  # then again, because this replay runs the layer


def test_not_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="this process computes on cpu: leave it off"):
        CudaRecorder()


def test_buffers_shared_between_layers_are_not_built() -> None:
    with pytest.raises(NotImplementedError, match="share_cudagraph_io_buffers is not built yet"):
        CudaGraphManager(settings(), share_cudagraph_io_buffers=True)
