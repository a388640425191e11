"""Matrix products of linear layers, beside the same in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.tensor_parallel import gemm
from megatron.core.tensor_parallel.gemm import add_product, linear, matmul, suits_onednn

M, N, K = 160, 136, 144
"""Large enough for oneDNN, which takes what is longer than 127 in all three."""

with_onednn = pytest.mark.skipif(not gemm.ONEDNN_MULTIPLIES, reason="products by oneDNN need a CPU with AVX-512")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(M, K), (M // 4, 4, K), (3, K)], ids=["matrix", "tokens", "few rows"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(shape: tuple[int, ...], transposed: bool, has_bias: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(K, N).t() if transposed else torch.randn(N, K)
    bias = torch.randn(N) if has_bias else None
    wanted = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            close(linear(x, weight, bias), wanted)


@with_onednn
def test_what_onednn_multiplies() -> None:
    a, b = torch.randn(M, K), torch.randn(N, K)
    assert not suits_onednn(a, b), "there is a gradient to be computed"
    with torch.no_grad():
        assert suits_onednn(a, b)
        assert not suits_onednn(a[:8], b) and not suits_onednn(a, b[:8])
        assert not suits_onednn(a.bfloat16(), b.bfloat16()) and not suits_onednn(a[:, :0], b[:, :0])


@torch.no_grad()
def test_matmul_with_long_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed matrix is copied first where its columns are long."""
    a, b = torch.randn(M // 4, 4, K), torch.randn(K, N)
    for longest in (gemm._LONGEST_STRIDED, K - 1):
        monkeypatch.setattr(gemm, "_LONGEST_STRIDED", longest)
        close(matmul(a, b), a.double() @ b.double())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros(M // 4, 4, K), None


def test_a_product_may_be_overwritten() -> None:
    """As the residual stream does with what a linear layer gives it: autograd forbids it for views."""
    product = _Product.apply(torch.randn(M // 4, 4, K, requires_grad=True), torch.randn(N, K))
    product.add_(1.0).sum().backward()


@pytest.mark.parametrize("rows", [5, 37])
def test_a_half_precision_product_is_rounded_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Also where it is made in pieces."""
    monkeypatch.setattr(gemm, "_PIECE", rows * K)
    total, a, b = torch.randn(M, K), torch.randn(M, N).bfloat16(), torch.randn(N, K).bfloat16()
    wanted = total + (a.double() @ b.double()).bfloat16().float()
    add_product(total, a, b)
    torch.testing.assert_close(total, wanted, rtol=2**-7, atol=1e-3)


@with_onednn
def test_can_be_traced() -> None:
    """By `torch.compile`, inside a whole layer."""

    @torch.compile(backend="eager", fullgraph=True)
    def product(x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return linear(x, weight)

    x, weight = torch.randn(M, K), torch.randn(N, K)
    close(product(x, weight), x.double() @ weight.double().t())
