"""Dropout with a mask of one byte draws what torch's own draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.fusions.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_same_numbers_as_torch(dtype: torch.dtype, probability: float) -> None:
    results = []
    for function in (dropout, torch.nn.functional.dropout):
        torch.manual_seed(1)
        x = torch.linspace(-2, 2, 60).to(dtype).requires_grad_()
        y = function(x, probability, True)
        y.backward(torch.linspace(0, 1, 60).to(dtype))
        results.append([y.detach(), torch.rand(3), x.grad])
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
    torch.testing.assert_close(results[0][2], results[1][2])  # half precision rounds the factor elsewhere


def test_the_mask_takes_one_byte_an_element() -> None:
    stored: list[Tensor] = []
    x = torch.randn(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        dropout(x, 0.5, True)
    assert sum(t.untyped_storage().nbytes() for t in stored) == 64


def test_nothing_is_dropped_outside_of_training() -> None:
    x = torch.randn(4)
    assert dropout(x, 0.5, False) is x
