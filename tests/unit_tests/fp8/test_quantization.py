"""Quantization against a list of all numbers that a format has, block by block."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.enums import Fp8Recipe
from megatron.core.fp8 import scaled_product as module
from megatron.core.fp8.quantization import (
    Quantized,
    cast,
    largest_magnitude,
    quantize_blocks,
    quantize_tensor,
    scale_for,
    widened,
)
from megatron.core.fp8.recipes import Block, Recipe, is_in_fp8
from megatron.core.fp8.scaled_product import plain_product, scaled_product
from megatron.core.fusions import compiled
from megatron.core.transformer.transformer_config import TransformerConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INF, NAN = float("inf"), float("nan")


def numbers_of(exponent_bits: int, mantissa_bits: int, largest: float) -> Tensor:
    """Every finite number of a format, from its definition: sign, biased exponent, mantissa, subnormals."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = {m / steps * 2.0 ** (1 - bias) for m in range(steps)}
    found |= {(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 2**exponent_bits) for m in range(steps)}
    positive = [number for number in found if number <= largest]
    return torch.tensor(sorted({*positive, *(-number for number in positive)}), dtype=torch.float64)


FORMATS = {E4M3: numbers_of(4, 3, 448.0), E5M2: numbers_of(5, 2, 57344.0)}


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each x is from the nearest number of the format."""
    return (x.double().reshape(-1, 1) - FORMATS[dtype]).abs().amin(1).view(x.shape)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_cast_takes_the_nearest_number(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert FORMATS[dtype].max() == largest
    x = torch.randn(4000) * torch.logspace(-7, math.log10(largest), 4000)
    x = torch.cat([x, FORMATS[dtype].float(), torch.tensor([3 * largest, -1e30, 0.0, -0.0])])
    found = cast(x, torch.ones(()), dtype).double()
    bounded = x.clamp(-largest, largest)
    torch.testing.assert_close((found - bounded.double()).abs(), nearest(bounded, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_byte_is_the_number_that_torch_takes_it_for(dtype: torch.dtype) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(dtype)
    torch.testing.assert_close(widened(data), data.float(), rtol=0, atol=0, equal_nan=True)


def test_what_is_not_finite_stays_visible() -> None:
    for dtype in (E4M3, E5M2):
        assert cast(torch.tensor([INF, -INF, NAN]), torch.ones(()), dtype).float().isnan().all()
    x = torch.tensor([[1.0, INF, 2.0, 3.0]])
    whole = quantize_tensor(x, E4M3, scale_for(largest_magnitude(x), E4M3)).dequantized()
    assert whole.isnan().all()
    blocks = quantize_blocks(x, E4M3, (1, 2), power_of_two=True).dequantized()
    assert blocks[0, :2].isnan().all() and blocks[0, 2:].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_zeros_and_the_smallest_numbers_keep_a_finite_scale(power_of_two: bool) -> None:
    for magnitude in (0.0, 1e-45, 1e-38, 1e38):
        scale = scale_for(torch.tensor(magnitude), E4M3, power_of_two)
        assert scale.isfinite() and scale > 0
    assert scale_for(torch.tensor(0.0), E4M3, power_of_two) == 1
    assert largest_magnitude(torch.empty(0, 4)) == 0
    assert quantize_blocks(torch.zeros(3, 40), E4M3, (1, 32), power_of_two).dequantized().eq(0).all()


def test_scales_put_the_maximum_at_the_end_of_the_format() -> None:
    assert scale_for(torch.tensor(896.0), E4M3) == 2
    assert scale_for(torch.tensor(448.0), E4M3, margin=3) == 8
    for magnitude, expected in ((448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (225.0, 1.0)):
        assert scale_for(torch.tensor(magnitude), E4M3, power_of_two=True) == expected


@pytest.mark.parametrize("block", [(1, 32), (1, 128), (128, 128), (4, 3)])
@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (1, 5)])
def test_each_block_has_its_own_scale(block: Block, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-6, 3, shape[1])
    found = quantize_blocks(x, E4M3, block, power_of_two=True)
    restored = found.dequantized()
    for i in range(0, shape[0], block[0]):
        for j in range(0, shape[1], block[1]):
            part = x[i : i + block[0], j : j + block[1]]
            scale = 2.0 ** math.ceil(math.log2(float(part.abs().max()) / 448))
            assert found.scale[i // block[0], j // block[1]] == scale
            away = (restored[i : i + block[0], j : j + block[1]] - part).double().abs()
            torch.testing.assert_close(away, nearest(part / scale, E4M3) * scale, rtol=0, atol=0)


def test_scales_of_blocks_fit_e8m0() -> None:
    x = torch.randn(64, 64) * torch.logspace(-30, 30, 64)
    scale = quantize_blocks(x, E4M3, (1, 32), power_of_two=True).scale
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)


@pytest.mark.parametrize("block", [None, (1, 32), (128, 128)])
def test_a_product_is_that_of_the_values(block: Block | None) -> None:
    torch.manual_seed(0)
    x, y, bias = torch.randn(20, 96), torch.randn(17, 96), torch.randn(17)
    if block is None:
        a, b = quantize_tensor(x, E4M3, torch.tensor(0.01)), quantize_tensor(y, E5M2, torch.tensor(0.003))
    else:
        a, b = quantize_blocks(x, E4M3, block, True), quantize_blocks(y, E5M2, block, True)
    exact = a.dequantized().double() @ b.dequantized().double().t() + bias
    torch.testing.assert_close(scaled_product(a, b, torch.float32, bias).double(), exact, rtol=1e-5, atol=1e-5)
    rounded = scaled_product(a, b, torch.bfloat16, bias)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 48, 64), (21, 35, 50), (1, 1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gradient", [E4M3, E5M2])
def test_torch_multiplies_the_same_numbers(
    shape: tuple[int, int, int], transposed: bool, gradient: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one product of torch's that a CPU has too, called as on CUDA: operands of any size and order in memory."""
    monkeypatch.setattr(module, "_order_that_works", lambda *_: "by kind")
    torch.manual_seed(0)
    m, n, k = shape
    x, y, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    a = quantize_tensor(x.t() if transposed else x, gradient, torch.tensor(0.01))
    b = quantize_tensor(y.t() if transposed else y, E4M3, torch.tensor(0.02))
    if transposed:
        a, b = a.transposed(), b.transposed()
    found = scaled_product(a, b, torch.float32, bias)
    torch.testing.assert_close(found, plain_product(a, b, torch.float32, bias), rtol=1e-5, atol=1e-5)


OPERANDS_OF_BLOCKS = {"x W": ((1, 128), (128, 128)), "dy x": ((1, 128), (1, 128)), "W x": ((128, 128), (1, 128))}
has_products_of_blocks = pytest.mark.skipif(not hasattr(module.F, "scaled_mm"), reason="this torch is before 2.10")
ODD_SIZES = [(200, 264, 600), (1, 1, 40), (256, 128, 512)]


def quantized_parts(shape: tuple[int, int, int], blocks: tuple[Block, Block]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    m, n, k = shape
    x, y = torch.randn(m, k) * torch.logspace(-2, 2, k), torch.randn(n, k) * torch.logspace(2, -2, n)[:, None]
    return quantize_blocks(x, E5M2, blocks[0], True), quantize_blocks(y, E4M3, blocks[1], True)


@has_products_of_blocks
@pytest.mark.parametrize("shape", ODD_SIZES)
@pytest.mark.parametrize("kind", OPERANDS_OF_BLOCKS)
def test_scales_of_blocks_lie_as_the_kernel_reads_them(
    kind: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CPU has that kernel: in its place stands one that reads its arguments as torch's documentation says."""
    monkeypatch.setattr(module, "_order_that_works", lambda *_: "by kind")
    monkeypatch.setattr(module.F, "scaled_mm", kernel_of_blocks)
    a, b = quantized_parts(shape, OPERANDS_OF_BLOCKS[kind])
    found = scaled_product(a, b, torch.float32)
    torch.testing.assert_close(found, plain_product(a, b, torch.float32), rtol=1e-5, atol=1e-5)


def kernel_of_blocks(
    a: Tensor, b: Tensor, scale_a: Tensor, kind_a: Any, scale_b: Tensor, kind_b: Any, output_dtype: torch.dtype
) -> Tensor:
    values = (
        a.float() * scales_of_elements(scale_a, kind_a, a.shape),
        b.float().t() * scales_of_elements(scale_b, kind_b, b.t().shape),
    )
    return (values[0] @ values[1].t()).to(output_dtype)


def scales_of_elements(scale: Tensor, kind: Any, shape: torch.Size) -> Tensor:
    (rows, k), flat = shape, torch.as_strided(scale, (scale.untyped_storage().nbytes() // 4,), (1,))
    row, column = torch.arange(rows)[:, None], torch.arange(k)[None]
    if kind == module.F.ScalingType.BlockWise1x128:
        return flat[column // 128 * rows + row]
    return flat[row // 128 * (4 * -(-k // 512)) + column // 128]


@has_products_of_blocks
@pytest.mark.parametrize("shape", ODD_SIZES)
@pytest.mark.parametrize("kind", [*OPERANDS_OF_BLOCKS, "one scale"])
@pytest.mark.parametrize("transposed", [False, True])
def test_cuda_takes_the_arguments_of_its_kernels(
    kind: str, shape: tuple[int, int, int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch checks sizes, orders in memory and types of such products without a GPU: of tensors that have no values."""
    monkeypatch.setattr(module, "_order_that_works", lambda *_: "by kind")
    m, n, k = shape
    if kind == "one scale":
        a, b = (quantize_tensor(torch.randn(rows, k), E4M3, torch.tensor(0.1)) for rows in (m, n))
        if transposed:
            a, b = (Quantized(x.data.t().contiguous(), x.scale, None, False).transposed() for x in (a, b))
    else:
        a, b = quantized_parts(shape, OPERANDS_OF_BLOCKS[kind])
        if transposed:  # as the optimizer's and autograd's views come, columns running fastest
            a, b = (replace(x, data=x.data.view(torch.uint8).t().contiguous().t().view(x.data.dtype)) for x in (a, b))
    a, b = (replace(x, data=x.data.to("meta"), scale=x.scale.to("meta")) for x in (a, b))
    for out_dtype in (torch.bfloat16, torch.float32):
        found = scaled_product(a, b, out_dtype)
        assert found.shape == (m, n) and found.dtype == out_dtype


@has_products_of_blocks
def test_the_checks_of_cuda_see_wrong_arguments() -> None:
    """The test above would not fail if torch checked nothing."""
    a, b = (torch.empty(size, 40, dtype=E4M3, device="meta") for size in (32, 48))
    one = torch.ones((), device="meta")
    with pytest.raises(RuntimeError, match="divisible by 16"):
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one)
    a, b = (torch.empty(size, 640, dtype=E4M3, device="meta") for size in (128, 256))
    kinds = module.F.ScalingType
    scales = torch.ones(128, 5, device="meta"), torch.ones(2, 5, device="meta").t()
    with pytest.raises(RuntimeError, match="blockwise scaling"):
        module.F.scaled_mm(a, b.t(), scales[0], kinds.BlockWise1x128, scales[1], kinds.BlockWise128x128)


@pytest.mark.parametrize("block", [(1, 32), (128, 128)])
def test_casts_are_one_graph(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, but for the code generator."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    x = torch.randn(40, 70)
    found = quantize_blocks(x, E4M3, block, True, compiled.region)
    assert torch.equal(found.dequantized(), quantize_blocks(x, E4M3, block, True).dequantized())
    scale = scale_for(compiled.region(largest_magnitude)(x), E4M3)
    assert torch.equal(quantize_tensor(x, E5M2, scale, compiled.region).data, quantize_tensor(x, E5M2, scale).data)


def config(**settings: object) -> TransformerConfig:
    return TransformerConfig(num_layers=6, hidden_size=8, num_attention_heads=2, fp8="hybrid", **settings)


def test_layers_at_both_ends_stay_in_bf16() -> None:
    assert all(is_in_fp8(config(), number) for number in range(1, 7))
    edges = config(
        fp8_recipe="tensorwise",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=2,
        num_layers_at_end_in_bf16=1,
    )
    assert [is_in_fp8(edges, number) for number in range(1, 7)] == [False, False, True, True, True, False]
    assert is_in_fp8(edges, None)


def test_recipes_follow_the_configuration() -> None:
    recipe = Recipe.of(config(fp8_recipe=Fp8Recipe.mxfp8, fp8_wgrad=False))
    assert recipe == Recipe.of(config(fp8_recipe="mxfp8", fp8_wgrad=False))
    assert recipe.scaling.activations == (1, 32) and not recipe.weight_gradients
    assert recipe.gradient_type == E5M2
    with pytest.raises(ValueError, match="tp_comm_overlap"):
        config(tp_comm_overlap=True, tensor_model_parallel_size=2, sequence_parallel=True)
