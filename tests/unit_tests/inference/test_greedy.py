"""The first greatest logit, found in blocks."""

from __future__ import annotations

import pytest
import torch

from megatron.core.inference.sampling import BLOCK, argmax


@pytest.mark.parametrize("size", [5, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 9 * BLOCK, 9 * BLOCK + 77])
def test_it_is_that_of_torch(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    rows = torch.randn(6, size, generator=random)
    ties = torch.randint(3, (40, size), generator=random).float()
    odd = torch.full((3, size), -torch.inf)
    odd[1, -1], odd[2, size // 2] = 0.0, torch.nan
    beside_padding = torch.randn(4, size + 9, generator=random)[:, :size]
    for logits in (rows, ties, odd, beside_padding):
        assert torch.equal(argmax(logits), logits.argmax(-1))
