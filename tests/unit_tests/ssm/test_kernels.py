"""How the kernels of other packages are called, against stand-ins with their signatures: the packages need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.extensions import mamba_kernels
from megatron.core.ssm.causal_conv import causal_conv
from megatron.core.ssm.ssd import chunked_scan


def scan_of_package(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, return_final_states: bool = False
) -> tuple[Tensor, Tensor]:
    """As `mamba_chunk_scan_combined`: [b, s, h, p], [b, s, h], [h], [b, s, g, n] twice."""
    assert return_final_states and all(part.is_contiguous() for part in (x, dt, B, C))
    y, state = chunked_scan(*(part.transpose(0, 1) for part in (x, dt)), A, B.transpose(0, 1), C.transpose(0, 1), 4)
    return y.transpose(0, 1), state


def conv_of_package(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `causal_conv1d_fn`: [b, c, s], channels next to each other, weight [c, k]."""
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    return F.conv1d(F.pad(x, (weight.size(1) - 1, 0)), weight.unsqueeze(1), bias, groups=x.size(1))


def test_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_kernels, "_scan_of_package", lambda: scan_of_package)
    x, dt, rates = torch.randn(9, 2, 4, 3), torch.rand(9, 2, 4), -torch.rand(4)
    b, c = torch.randn(9, 2, 2, 5), torch.randn(9, 2, 2, 5)
    found: Any = mamba_kernels.kernel_scan(x, dt, rates, b, c, 4)
    torch.testing.assert_close(found, chunked_scan(x, dt, rates, b, c, 4))


def test_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_kernels, "_conv_of_package", lambda: conv_of_package)
    projected, weight, bias = torch.randn(9, 2, 11), torch.randn(8, 1, 4), torch.randn(8)
    x = projected[..., 3:]
    torch.testing.assert_close(mamba_kernels.kernel_conv(x, weight, bias), causal_conv(x, weight, bias))


def test_kernels_are_for_gpus_only() -> None:
    assert not mamba_kernels.kernels_fit(torch.zeros(1))
    assert not mamba_kernels.conv_kernel_fits(torch.zeros(9, 2, 8), 4)
