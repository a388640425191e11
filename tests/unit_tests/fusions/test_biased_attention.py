"""Attention with a learned bias against torch's explicit formula in fp64, gradients too."""

from __future__ import annotations

import pytest
import torch

from megatron.core.fusions.biased_attention import biased_attention, computes_with_bias


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("case", ["all", "causal", "padding"])
def test_matches_formula(case: str, scale: float) -> None:
    torch.manual_seed(0)
    b, a, s, sk = 3, 4, 21, 21 if case == "causal" else 17
    inputs = [torch.randn(n, b, a, 8).permute(1, 2, 0, 3).requires_grad_() for n in (s, sk, sk)]
    bias = torch.randn(1, a, s, sk, requires_grad=True)
    hidden = {
        "all": None,
        "causal": torch.ones(s, s, dtype=torch.bool).triu(1),
        "padding": (torch.arange(sk) >= torch.tensor([sk, 9, 0])[:, None])[:, None, None],  # the last sample sees none
    }[case]
    wide = [x.detach().double().requires_grad_() for x in (*inputs, bias)]
    scores = wide[0] @ wide[1].transpose(-1, -2) * scale + wide[3]
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    expected = torch.softmax(scores, -1).nan_to_num() @ wide[2]
    actual = biased_attention(*inputs, bias, hidden, scale)
    grad = torch.randn(expected.shape)
    actual.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    for x, wanted in zip((*inputs, bias), wide):
        torch.testing.assert_close(x.grad, wanted.grad.nan_to_num().float(), rtol=1e-5, atol=1e-5)


def test_what_it_takes() -> None:
    q, k = torch.empty(2, 4, 8, 16), torch.empty(2, 4, 6, 16)
    bias = torch.empty(1, 4, 8, 6)
    assert computes_with_bias(q, k, k, bias)
    assert not computes_with_bias(q, k[:, :2], k[:, :2], bias)
    assert not computes_with_bias(q, k, k, bias.expand(2, -1, -1, -1))
    assert not computes_with_bias(q.double(), k.double(), k.double(), bias)
