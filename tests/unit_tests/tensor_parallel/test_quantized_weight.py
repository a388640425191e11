"""Weights in few bits: values near those given, products of just the stored values, bytes as computed."""

from __future__ import annotations

import pytest
import torch

from megatron.core.tensor_parallel.quantized_weight import FP8, GROUP, QuantizedWeight

ERRORS = {"int8": 1 / 254, "int4": 1 / 8, "fp8": 1 / 16}
"""Of a value, relative to the largest of its row (fp8: to itself, above the smallest exponents)."""
BYTES = {"int8": 1 + 4 / 96, "int4": 1 / 2 + 2 / GROUP, "fp8": 1 + 4 / 96}


def some_weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 96, generator=random) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("kind", ERRORS)
def test_values_are_near(kind: str) -> None:
    weight = some_weight()
    quantized = QuantizedWeight(weight, kind)
    found = quantized.dequantized()
    largest = weight.abs().amax(1, keepdim=True)
    assert ((found - weight).abs() <= 1.01 * ERRORS[kind] * largest).all()
    assert (found[7] == 0).all()
    assert quantized.nbytes == round(BYTES[kind] * weight.numel())
    again = QuantizedWeight(found, kind).dequantized()
    torch.testing.assert_close(again, found, rtol=0.01, atol=0)


def test_fp8_is_torchs() -> None:
    weight = some_weight()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(FP8).max
    expected = (weight / scale).to(FP8).float() * scale
    torch.testing.assert_close(QuantizedWeight(weight, "fp8").dequantized(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 30])
def test_products_are_of_the_stored_values(kind: str, dtype: torch.dtype, rows: int) -> None:
    quantized = QuantizedWeight(some_weight(dtype), kind)
    x = torch.randn(rows, 2, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = x.double() @ quantized.dequantized(torch.float64).t()
    reach = x.double().abs() @ quantized.dequantized(torch.float64).abs().t()
    product = quantized.multiply(x)
    assert product.dtype is dtype and product.shape == (rows, 2, 50)
    precision = 1e-5 if dtype is torch.float32 else 2e-2
    assert ((product.double() - exact).abs() <= precision * reach + 1e-30).all()


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match="int8, int4, fp8"):
        QuantizedWeight(some_weight(), "int2")
    with pytest.raises(ValueError, match="multiples of 32"):
        QuantizedWeight(some_weight()[:, :40], "int4")
