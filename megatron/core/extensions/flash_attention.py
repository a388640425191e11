"""The `flash-attn` package (Dao et al., arXiv:2205.14135, arXiv:2307.08691), where it is installed and
works."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

Window = tuple[int, int]


@functools.cache
def flash_attn_package() -> ModuleType | None:
    """The package, None where it cannot be imported."""
    try:
        import flash_attn
    except Exception:
        return None
    return flash_attn if hasattr(flash_attn, "flash_attn_func") else None


def can_flash_attend(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the package is there and its kernels take such queries."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_half and head_dim <= 256 and flash_attn_package() is not None


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, scale: float, is_causal: bool, window: Window
) -> Tensor:
    """[b, s, a, d] of queries [b, s, a, d], keys and values [b, s, g, d]."""
    package = flash_attn_package()
    assert package is not None
    return package.flash_attn_func(q, k, v, dropout_p, softmax_scale=scale, causal=is_causal, window_size=window)


def flash_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
    scale: float,
    is_causal: bool,
    window: Window,
) -> Tensor:
    """[n, a, d] of n tokens in sequences that begin at `starts` (int32, the total at its end)."""
    package = flash_attn_package()
    assert package is not None
    return package.flash_attn_varlen_func(
        q,
        k,
        v,
        starts,
        starts,
        max_length,
        max_length,
        dropout_p,
        softmax_scale=scale,
        causal=is_causal,
        window_size=window,
    )
