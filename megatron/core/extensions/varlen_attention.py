"""torch's own attention over packed sequences, which newer versions have for CUDA."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Window = tuple[int, int]


@functools.cache
def varlen_function() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """`torch.nn.attention.varlen.varlen_attn` and the names of its parameters, None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except Exception:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def can_varlen_attend(q: Tensor, window: Window, dropout_p: float, is_grouped: bool) -> bool:
    """Whether torch's kernel takes this: CUDA, half precision, no dropout, and a window it can express."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or dropout_p > 0:
        return False
    found = varlen_function()
    if found is None:
        return False
    names = found[1]
    has_window = "window_size" in names or (window in ((-1, 0), (-1, -1)) and "is_causal" in names)
    return has_window and "scale" in names and (not is_grouped or "enable_gqa" in names)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, max_length: int, scale: float, window: Window
) -> Tensor:
    """[n, a, d] of n tokens in sequences that begin at `starts` (int32, the total at its end)."""
    found = varlen_function()
    assert found is not None
    attend, names = found
    how: dict[str, Any] = {"window_size": window} if "window_size" in names else {"is_causal": window == (-1, 0)}
    if q.size(1) != k.size(1):
        how["enable_gqa"] = True
    return attend(q, k, v, starts, starts, max_length, max_length, scale=scale, **how)
