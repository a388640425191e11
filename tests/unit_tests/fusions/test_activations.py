"""Fused activations against the same formula in plain torch operations, in fp64, gradients too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions.fused_bias_dropout import (
    bias_dropout_add_fused_inference,
    bias_dropout_add_fused_train,
    bias_dropout_add_unfused,
    get_bias_dropout_add,
)
from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
from megatron.core.fusions.fused_bias_gelu import GeLUFunction, bias_gelu, bias_gelu_back, bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu, bias_swiglu_impl


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return activation(gate) * up


FUSED = {
    "gelu": (bias_gelu_impl, tanh_gelu),
    "geglu": (bias_geglu_impl, lambda x: gated(tanh_gelu, x)),
    "swiglu": (bias_swiglu_impl, lambda x: gated(lambda gate: gate * torch.sigmoid(gate), x)),
}


def inputs(dtype: torch.dtype, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(8, dtype=torch.float64).to(dtype).requires_grad_() if with_bias else None
    return x, bias


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_matches_formula(name: str, with_bias: bool) -> None:
    fused, formula = FUSED[name]
    x, bias = inputs(torch.float64, with_bias)
    leaves = [leaf for leaf in (x, bias) if leaf is not None]
    expected = formula(x if bias is None else x + bias)
    grad = torch.randn_like(expected)
    actual = fused(x, bias)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("name", FUSED)
def test_numerical_gradient(name: str) -> None:
    x, bias = inputs(torch.float64, True)
    assert torch.autograd.gradcheck(FUSED[name][0], (x, bias))


@pytest.mark.parametrize("name", FUSED)
def test_bf16_stays_bf16(name: str) -> None:
    fused, formula = FUSED[name]
    x, bias = inputs(torch.bfloat16, True)
    y = fused(x, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, formula((x + bias).double()).to(torch.bfloat16))


def test_public_pieces_of_bias_gelu() -> None:
    x, bias = inputs(torch.float64, True)
    assert bias is not None
    grad = torch.randn(x.shape, dtype=x.dtype)
    y = GeLUFunction.apply(x, bias)
    torch.testing.assert_close(bias_gelu(bias, x), y)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(bias_gelu_back(grad, bias, x), expected)
    torch.testing.assert_close(bias_swiglu(x, bias), bias_swiglu_impl(x, bias))


def test_fp8_store_is_refused() -> None:
    x, bias = inputs(torch.float32, True)
    with pytest.raises(NotImplementedError, match="fp8_input_store"):
        bias_swiglu_impl(x, bias, fp8_input_store=True)


def test_what_swiglu_keeps_can_be_put_away() -> None:
    x, bias = inputs(torch.float32, True)
    kept: list[torch.Size] = []

    def put_away(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(put_away, lambda tensor: tensor):
        y = bias_swiglu_impl(x, bias, cpu_offload_input=True)
    assert x.shape in kept
    grad = torch.randn(y.shape)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(bias_swiglu_impl(x, bias), (x, bias), grad)
    )


@pytest.mark.parametrize("residual_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_dropout_add_without_dropout(with_bias: bool, residual_type: torch.dtype) -> None:
    x, bias = inputs(torch.bfloat16, with_bias)
    residual = torch.randn(x.shape, dtype=residual_type, requires_grad=True)
    expected = residual + (x if bias is None else x + bias)
    for function in (
        bias_dropout_add_fused_inference,
        bias_dropout_add_unfused(training=False),
        get_bias_dropout_add(training=False, fused=True),
    ):
        y = function((x, bias), residual, 0.5)
        assert y.dtype == residual_type and torch.equal(y, expected)
    assert torch.equal(bias_dropout_add_fused_train((x, bias), residual, 0.0), expected)
    expected.sum().backward()
    wanted = [leaf.grad.clone() for leaf in (x, residual)]
    x.grad = residual.grad = None
    bias_dropout_add_fused_train((x, bias), residual, 0.0).sum().backward()
    assert torch.equal(x.grad, wanted[0]) and torch.equal(residual.grad, wanted[1])


def test_bias_dropout_add_drops_and_keeps_the_residual() -> None:
    x, bias = inputs(torch.float32, True)
    residual = torch.randn(x.shape, requires_grad=True)
    torch.manual_seed(1)
    y = bias_dropout_add_fused_train((x, bias), residual, 0.5)
    torch.manual_seed(1)
    expected = residual + F.dropout(x + bias, 0.5)
    torch.testing.assert_close(y, expected)
    assert (y == residual).any() and not torch.equal(y, residual)
    leaves, direction = (x, bias, residual), torch.randn(x.shape)
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, direction) for z in (y, expected)))
