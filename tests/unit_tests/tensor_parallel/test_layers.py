"""Parallel layers against one serial layer, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    model_parallel_cuda_manual_seed,
    vocab_parallel_cross_entropy,
)
from megatron.core.utils import init_method_normal
from tests.worker_pool import run_ranks


def build_config(tp: int, sequence_parallel: bool = False, **kwargs: object) -> ModelParallelConfig:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(123)
    return ModelParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, **kwargs)


def part(x: Tensor, tp: int, dim: int) -> Tensor:
    return x.chunk(tp, dim)[parallel_state.get_tensor_model_parallel_rank()]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def check_column(tp: int, sequence_parallel: bool, fused: bool) -> None:
    config = build_config(tp, sequence_parallel, gradient_accumulation_fusion=fused)
    layer = ColumnParallelLinear(8, 12, config=config, init_method=init_method_normal(0.3))
    torch.manual_seed(0)
    weight, x, target = leaf(torch.randn(12, 8)), leaf(torch.randn(4, 2, 8)), torch.randn(4, 2, 12)
    with torch.no_grad():
        layer.weight.copy_(part(weight, tp, 0))
    if fused:
        layer.weight.main_grad = torch.ones_like(layer.weight)
    local_x = leaf(part(x, tp, 0)) if sequence_parallel else leaf(x)
    output, bias = layer(local_x)
    assert bias is None
    (output * part(target, tp, -1)).sum().backward()
    expected = F.linear(x, weight)
    (expected * target).sum().backward()
    torch.testing.assert_close(output, part(expected, tp, -1))
    torch.testing.assert_close(local_x.grad, part(x.grad, tp, 0) if sequence_parallel else x.grad)
    wgrad = layer.weight.main_grad - 1 if fused else layer.weight.grad
    torch.testing.assert_close(wgrad, part(weight.grad, tp, 0))
    torch.testing.assert_close(layer.bias.grad, part(target.sum((0, 1)), tp, 0))


def check_row(tp: int, sequence_parallel: bool, fused: bool) -> None:
    config = build_config(tp, sequence_parallel, gradient_accumulation_fusion=fused)
    layer = RowParallelLinear(
        8,
        12,
        config=config,
        init_method=init_method_normal(0.3),
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    torch.manual_seed(0)
    weight, x, target = leaf(torch.randn(12, 8)), leaf(torch.randn(4, 2, 8)), torch.randn(4, 2, 12)
    with torch.no_grad():
        layer.weight.copy_(part(weight, tp, 1))
    if fused:
        layer.weight.main_grad = torch.ones_like(layer.weight)
    local_x = leaf(part(x, tp, -1))
    output, _ = layer(local_x)
    (output * (part(target, tp, 0) if sequence_parallel else target)).sum().backward()
    expected = F.linear(x, weight)
    (expected * target).sum().backward()
    torch.testing.assert_close(output, part(expected, tp, 0) if sequence_parallel else expected)
    torch.testing.assert_close(local_x.grad, part(x.grad, tp, -1))
    wgrad = layer.weight.main_grad - 1 if fused else layer.weight.grad
    torch.testing.assert_close(wgrad, part(weight.grad, tp, 1))
    assert layer.bias.sequence_parallel == sequence_parallel


def check_embedding(tp: int, sequence_parallel: bool, fused: bool) -> None:
    config = build_config(tp, sequence_parallel, gradient_accumulation_fusion=fused)
    layer = VocabParallelEmbedding(
        16, 6, config=config, init_method=init_method_normal(0.3), reduce_scatter_embeddings=sequence_parallel
    )
    torch.manual_seed(0)
    table, ids = leaf(torch.randn(16, 6)), torch.randint(0, 16, (2, 4))
    target = torch.randn(2, 4, 6)
    with torch.no_grad():
        layer.weight.copy_(part(table, tp, 0))
    if fused:
        layer.weight.main_grad = torch.ones_like(layer.weight)
    output = layer(ids)  # [b, s, h], or [s/tp, b, h]
    expected = F.embedding(ids, table)
    (expected * target).sum().backward()
    if sequence_parallel:
        expected, target = part(expected.transpose(0, 1), tp, 0), part(target.transpose(0, 1), tp, 0)
    (output * target).sum().backward()
    torch.testing.assert_close(output, expected)
    wgrad = layer.weight.main_grad - 1 if fused else layer.weight.grad
    torch.testing.assert_close(wgrad, part(table.grad, tp, 0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("check", [check_column, check_row, check_embedding])
def test_layer_matches_serial(check, tp: int, sequence_parallel: bool, fused: bool) -> None:
    run_ranks(tp, check, tp, sequence_parallel, fused)


def check_cross_entropy(tp: int, vocab_size: int, smoothing: float, dtype: torch.dtype) -> None:
    build_config(tp)
    torch.manual_seed(0)
    padded = 16
    logits = leaf((torch.randn(3, 2, padded) * 3).to(dtype))
    target = torch.randint(0, vocab_size, (3, 2))
    weights = torch.rand(3, 2)
    local = leaf(part(logits, tp, -1))
    loss = vocab_parallel_cross_entropy(local, target, smoothing, vocab_size=vocab_size)
    (loss * weights).sum().backward()
    log_probs = torch.log_softmax(logits[..., :vocab_size].float(), -1)
    nll = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    spread = smoothing * vocab_size / (vocab_size - 1)
    expected = (1 - spread) * nll - spread * log_probs.mean(-1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(local.grad, part(logits.grad, tp, -1))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [16, 13, 7])  # 7: the last of 4 ranks holds nothing but padding
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_ignores_padding(tp: int, vocab_size: int, smoothing: float) -> None:
    run_ranks(tp, check_cross_entropy, tp, vocab_size, smoothing, torch.float32)


def test_cross_entropy_of_half_precision_logits() -> None:
    run_ranks(2, check_cross_entropy, 2, 16, 0.0, torch.bfloat16)


def test_cross_entropy_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        vocab_parallel_cross_entropy(torch.zeros(3, 2, 4), torch.zeros(2, 3, dtype=torch.int64))


def check_fp16_is_computed_in_fp32() -> None:
    """Rounded once, at the end, not after every product."""
    config = build_config(1, params_dtype=torch.float16)
    layer = ColumnParallelLinear(256, 64, config=config, init_method=init_method_normal(1.0))
    x = torch.randn(8, 2, 256).half().requires_grad_()
    output, _ = layer(x)
    assert output.dtype == torch.float16
    assert torch.equal(output, F.linear(x.float(), layer.weight.float()).half())
    output.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float16
    torch.testing.assert_close(x.grad.double(), layer.weight.double().sum(0).expand_as(x), rtol=1e-3, atol=1e-2)


def test_fp16_is_computed_in_fp32_on_a_cpu() -> None:
    run_ranks(1, check_fp16_is_computed_in_fp32)
