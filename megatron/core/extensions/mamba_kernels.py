"""The kernels of the packages `mamba-ssm` and `causal-conv1d`, where they are installed and work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


@functools.cache
def _scan_of_package() -> Callable[..., Any] | None:
    """The chunked scan of `mamba-ssm`, None where it cannot be imported (it may fail with any error)."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception:
        return None
    return mamba_chunk_scan_combined


@functools.cache
def _conv_of_package() -> Callable[..., Any] | None:
    """The convolution of `causal-conv1d`, None where it cannot be imported."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception:
        return None
    return causal_conv1d_fn


def kernels_fit(x: Tensor) -> bool:
    """Whether the scan's kernel is there for tensors like `x`."""
    return x.is_cuda and _scan_of_package() is not None


def kernel_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """As `ssd.chunked_scan`, by the package's kernel, which wants the batch first."""
    scan = _scan_of_package()
    assert scan is not None
    batch_first = (part.transpose(0, 1).contiguous() for part in (x, dt))
    B, C = (part.transpose(0, 1).contiguous() for part in (B, C))
    y, state = scan(*batch_first, A, B, C, chunk_size, return_final_states=True)
    return y.transpose(0, 1), state.detach()


def conv_kernel_fits(x: Tensor, taps: int) -> bool:
    """Whether the convolution's kernel is there for x [s, b, c] and so many taps."""
    return x.is_cuda and 2 <= taps <= 4 and x.size(-1) % 8 == 0 and _conv_of_package() is not None


def kernel_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `causal_conv`, by the package's kernel, which takes [b, c, s] with channels next to each other and a multiple
    of 8 numbers from token to token: a part of a wider projection may have another width."""
    conv = _conv_of_package()
    assert conv is not None
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    y = conv(x.permute(1, 2, 0), weight.squeeze(1), bias)
    return y.permute(2, 0, 1)
