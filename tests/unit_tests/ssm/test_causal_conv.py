"""The convolution against torch's own, and one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.ssm.causal_conv import causal_conv, conv_step, last_inputs

S, B, C, K = 11, 2, 6, 4


def inputs(length: int = S) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    parts = torch.randn(length, B, C), torch.randn(C, 1, K), torch.randn(C)
    return tuple(part.double().requires_grad_() for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("length", [S, 3, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_a_padded_depthwise_convolution(length: int, biased: bool) -> None:
    x, weight, bias = inputs(length)
    wanted = [x, weight, bias] if biased else [x, weight]
    expected = F.conv1d(F.pad(x.permute(1, 2, 0), (K - 1, 0)), weight, bias if biased else None, groups=C)
    expected = expected.permute(2, 0, 1)
    found = causal_conv(x, weight, bias if biased else None)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("seen", [1, 2, 7])
def test_steps_go_on_after_a_prompt(seen: int) -> None:
    x, weight, bias = (part.detach() for part in inputs())
    expected = causal_conv(x, weight, bias)
    state = last_inputs(x[:seen], K)
    for t in range(seen, S):
        torch.testing.assert_close(conv_step(x[t], state, weight, bias), expected[t])
