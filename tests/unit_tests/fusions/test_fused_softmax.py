"""The fused scale-mask-softmax against plain torch, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.fusions.fused_softmax import (
    FusedScaleMaskSoftmax,
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import attention_mask_func


def build(fused: bool, mask_type: AttnMaskType, scale: float | None = None) -> FusedScaleMaskSoftmax:
    return FusedScaleMaskSoftmax(
        input_in_fp16=False,
        input_in_bf16=False,
        attn_mask_type=mask_type,
        scaled_masked_softmax_fusion=fused,
        mask_func=attention_mask_func,
        softmax_in_fp32=True,
        scale=scale,
    )


def scores() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 6, 6, requires_grad=True)


@pytest.mark.parametrize("mask_kind", ["given", "causal", "none"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_matches_plain_torch(fused: bool, mask_kind: str, scale: float | None) -> None:
    mask = torch.rand(2, 1, 6, 6) < 0.4 if mask_kind == "given" else None
    softmax = build(fused, AttnMaskType.causal if mask_kind == "causal" else AttnMaskType.padding, scale)
    x = scores()
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) if mask_kind == "causal" else mask
    raw = x * (scale or 1.0)
    expected = torch.softmax(raw if hidden is None else raw.masked_fill(hidden, -10000.0), -1)
    grad = torch.randn_like(expected)
    actual = softmax(x, mask)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, grad), torch.autograd.grad(expected, x, grad))


def test_public_functions() -> None:
    x = scores()
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    causal = ScaledUpperTriangMaskedSoftmax.apply(x.view(6, 6, 6), 0.5).view_as(x)
    torch.testing.assert_close(causal, ScaledMaskedSoftmax.apply(x, mask, 0.5))
    (by_causal,) = torch.autograd.grad(causal.square().sum(), x)
    (by_mask,) = torch.autograd.grad(ScaledMaskedSoftmax.apply(x, mask, 0.5).square().sum(), x)
    torch.testing.assert_close(by_causal, by_mask)
    plain = ScaledSoftmax.apply(x, 0.5)
    torch.testing.assert_close(plain, torch.softmax(x * 0.5, -1))
    plain.square().sum().backward()


def test_half_precision_keeps_its_type() -> None:
    for fused in (True, False):
        y = build(fused, AttnMaskType.causal)(scores().to(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float().sum(-1), torch.ones(2, 3, 6), rtol=1e-2, atol=1e-2)


def test_one_query_sees_everything() -> None:
    x = scores()[:, :, :1]
    torch.testing.assert_close(build(True, AttnMaskType.causal)(x), torch.softmax(x, -1))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="at once"):
        FusedScaleMaskSoftmax(True, True, AttnMaskType.causal, True, None, True, None)
    with pytest.raises(ValueError, match="attention_softmax_in_fp32"):
        FusedScaleMaskSoftmax(True, False, AttnMaskType.causal, True, None, False, 2.0)
