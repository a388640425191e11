"""Other arithmetic for the same code, in backward too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.training.verify.modes import Float64, Reordered, widen


class Squared(torch.autograd.Function):
    """x² computed in fp32 whatever the type of x, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.float().square().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 * x.to(torch.float32) * grad.float()).to(grad.dtype)


@pytest.mark.parametrize("backward", [torch.autograd.backward, torch.Tensor.backward])
def test_float64_reaches_forward_and_backward(backward: Any) -> None:
    value = 1.0 + 1e-12  # 1 in float32
    with Float64():
        x = torch.tensor(value, requires_grad=True, dtype=torch.float32)
        y = Squared.apply(x)
        backward(y)
        assert torch.zeros(1).dtype == torch.zeros(1, dtype=torch.float32).dtype == torch.float64
    assert x.dtype == y.dtype == torch.float64
    assert x.grad is not None and float(x.grad) == 2 * value
    assert torch.zeros(1).dtype == torch.zeros(1).float().dtype == torch.float32


def test_gradients_of_several_tensors() -> None:
    with Float64():
        x = torch.ones(2, requires_grad=True)
        torch.autograd.backward([x * 2, x.sum()], [torch.tensor([1.0, 10.0]), None])
    assert x.grad is not None and x.grad.tolist() == [3.0, 21.0]


def test_paused_it_is_float32() -> None:
    mode = Float64()
    with mode, mode.paused():
        assert torch.zeros(1).dtype == torch.zeros(1).double().float().dtype == torch.float32


def test_default_type_returns_after_an_error() -> None:
    with pytest.raises(ValueError, match="planted"), Float64():
        raise ValueError("planted")
    assert torch.get_default_dtype() == torch.float32


def test_widen_rounds_first() -> None:
    model = nn.BatchNorm1d(1)
    nn.init.constant_(model.weight, 1.001)
    widen(model, torch.bfloat16)
    assert model.weight.dtype == model.running_mean.dtype == torch.float64
    assert model.weight.item() == 1.0
    assert model.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("multiply", [torch.matmul, lambda a, b: a @ b, lambda a, b: nn.functional.linear(a, b.mT)])
def test_reordered_products_are_the_products(multiply: Any) -> None:
    a, b = torch.randn(3, 8, 64), torch.randn(64, 16)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    plain = multiply(a.bfloat16(), b.bfloat16()).double()
    found = []
    for seed in (0, 1, 0):
        with Reordered(seed):
            found.append(multiply(a.bfloat16(), b.bfloat16()).double())
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], plain)
    for one in found:
        error = (one - exact).norm() / exact.norm()
        assert 0 < error < 2 * 2.0**-8


def test_reordered_leaves_float32_alone() -> None:
    a, b = torch.randn(8, 64), torch.randn(64, 16)
    plain = a @ b
    with Reordered(0):
        assert torch.equal(a @ b, plain)


def test_reordered_backward() -> None:
    x, w = torch.randn(8, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    gradients = []
    for seed in (None, 0, 1):
        leaf = w.clone().requires_grad_()
        if seed is None:
            torch.autograd.backward(nn.functional.linear(x, leaf).sum())
        else:
            with Reordered(seed):
                torch.autograd.backward(nn.functional.linear(x, leaf).sum())
        assert leaf.grad is not None
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-1)
