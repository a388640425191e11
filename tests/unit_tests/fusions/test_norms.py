"""LayerNorm and RMSNorm against fp64 formulas, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm, layer_norm
from megatron.core.fusions.fused_rms_norm import rms_norm
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

EPS = 1e-3  # large enough to see where it enters


def formula(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
    return y if bias is None else y + bias


def build(normalization: str, zero_centered: bool, dtype: torch.dtype) -> FusedLayerNorm:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=dtype,
    )
    norm = FusedLayerNorm(config, 16, eps=EPS)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in norm.parameters():
            param.add_(0.2 * torch.randn(param.shape))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_matches_fp64(normalization: str, zero_centered: bool, dtype: torch.dtype) -> None:
    norm = build(normalization, zero_centered, dtype)
    x = (torch.randn(5, 3, 16) * 2 + 0.5).to(dtype).requires_grad_()
    grad = torch.randn(5, 3, 16).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    y.backward(grad)

    wide = [t.detach().double().requires_grad_() for t in (x, *norm.parameters())]
    gain = wide[1] + 1 if zero_centered else wide[1]
    expected = formula(wide[0], gain, wide[2] if normalization == "LayerNorm" else None)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.to(dtype))
    # bf16: sums over 15 rows of values rounded to 8 bits
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for leaf, wanted in zip((x, *norm.parameters()), wide):
        torch.testing.assert_close(leaf.grad, wanted.grad.to(dtype), **tolerance)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_fp32_residual_goes_in_and_half_precision_comes_out(normalization: str) -> None:
    norm = build(normalization, False, torch.bfloat16)
    x = torch.randn(4, 16, requires_grad=True)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and norm.weight.grad.dtype == torch.bfloat16


def test_gradient_of_rms_norm_numerically() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


def test_small_gain_is_not_rounded_away() -> None:
    """In bf16, 1 + 0.002 is 1: a zero-centred gain must act all the same."""
    for normalization in ("LayerNorm", "RMSNorm"):
        norm = build(normalization, True, torch.bfloat16)
        with torch.no_grad():
            norm.weight.fill_(0.002)
        x = torch.full((1, 16), 512.0, dtype=torch.float32)
        x[:, ::2] *= -1
        if normalization == "RMSNorm":
            torch.testing.assert_close(
                rms_norm(x, norm.weight, 0.0, zero_centered=True), x.sign() * 1.002, rtol=1e-5, atol=0
            )
        else:
            with torch.no_grad():
                norm.bias.zero_()
            y = layer_norm(x, norm.weight.float(), norm.bias.float(), 0.0, zero_centered=True)
            torch.testing.assert_close(y, x.sign() * 1.002, rtol=1e-5, atol=0)


def test_attributes_and_initial_values() -> None:
    plain, centred = build("LayerNorm", False, torch.float32), build("RMSNorm", True, torch.float32)
    assert plain.weight.sequence_parallel is False and centred.bias is None
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    fresh = WrappedTorchNorm(config, 8)
    assert torch.equal(fresh.weight, torch.ones(8)) and torch.equal(fresh.bias, torch.zeros(8))
    assert torch.equal(FusedLayerNorm(config, 8, zero_centered_gamma=True).weight, torch.zeros(8))


def test_l2_norm() -> None:
    x = torch.randn(3, 8)
    expected = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(L2Norm(8)(x), expected)
