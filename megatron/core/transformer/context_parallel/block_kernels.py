"""Attention of some queries to some of their keys, with what is needed to combine it with that to other keys: the
logarithm of the softmax's denominator (Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691, section 3.1).

Queries are [b, a, n, d] in any strides, keys and values [b, g, m, d]; a heads, g query groups, d head width. The result
of a block is (out [b, a, n, d], lse [b, a, n]); lse is fp32 (fp64 for fp64 inputs) and -inf where a query sees none of
the keys, whose out is 0 then. Backward takes out and lse of *all* keys and gives this block's share of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core.transformer.context_parallel.layout import Block, Order, Window
from megatron.core.transformer.utils import outside_window

Results = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]
aten = torch.ops.aten


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which blocks are combined: fp32, or fp64 for fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class BlockKernel(Protocol):
    """Computes one block of a plan."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        """(out, lse, what backward needs beyond its arguments)."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Any
    ) -> Gradients:
        """(dq, dk, dv) of the block."""


# --- torch's fused kernels -----------------------------------------------------------------------------------------


def _repeated(q: Tensor, *keys: Tensor) -> list[Tensor]:
    """Keys and values with one head for each of the queries'."""
    return [x if x.size(1) == q.size(1) else x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in keys]


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what `_repeated` repeated."""
    if grad.size(1) == like.size(1):
        return grad
    b, g, m, d = like.shape
    return grad.view(b, g, -1, m, d).sum(2, dtype=accumulation_type(grad.dtype))


@dataclass(frozen=True)
class FusedCpuKernel:
    """torch's flash attention for CPUs."""

    scale: float
    is_causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        k, v = _repeated(q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, self.is_causal, scale=self.scale)
        return out, lse, None

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Any
    ) -> Gradients:
        keys, values = _repeated(q, k, v)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, keys, values, out, lse, 0.0, self.is_causal, scale=self.scale
        )
        return dq, _summed(dk, k), _summed(dv, v)


@dataclass(frozen=True)
class FlashCudaKernel:
    """FlashAttention-2 as torch has it for CUDA, half precision."""

    scale: float
    is_causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        k, v = _repeated(q, k, v)
        results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, self.is_causal, False, scale=self.scale)
        return results[0], results[1], results[2:8]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Any
    ) -> Gradients:
        keys, values = _repeated(q, k, v)
        starts_q, starts_k, max_q, max_k, seed, offset = saved
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad,
            q,
            keys,
            values,
            out,
            lse.contiguous(),
            starts_q,
            starts_k,
            max_q,
            max_k,
            0.0,
            self.is_causal,
            seed,
            offset,
            scale=self.scale,
        )
        return dq, _summed(dk, k), _summed(dv, v)


@dataclass(frozen=True)
class EfficientCudaKernel:
    """The memory-efficient kernel that torch has for CUDA, fp32 too (Rabe & Staats, arXiv:2112.05682)."""

    scale: float
    is_causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        k, v = _repeated(q, k, v)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, self.is_causal, scale=self.scale
        )
        # The kernel pads its rows to a multiple of its tile.
        return out, lse[..., : q.size(2)], (seed, offset, lse.size(-1))

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Any
    ) -> Gradients:
        keys, values = _repeated(q, k, v)
        seed, offset, rows = saved
        padded = torch.nn.functional.pad(lse, (0, rows - lse.size(-1)), value=math.inf)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad,
            q,
            keys,
            values,
            None,
            out,
            padded,
            seed,
            offset,
            0.0,
            [True, True, True, False],
            self.is_causal,
            scale=self.scale,
        )
        return dq, _summed(dk, k), _summed(dv, v)


# --- written out ---------------------------------------------------------------------------------------------------

TILE = 2**20
"""Scores of one head that are in memory at a time, at most (or one query's)."""


@dataclass(frozen=True)
class WrittenOutKernel:
    """Any mask, bands and dropout: scores of some queries at a time, as plain matrix products in the type of
    accumulation."""

    scale: float
    block: Block
    window: Window
    hidden: Tensor | None = None
    """[b or 1, a or 1, n or 1, m] bool, True where a key is hidden."""
    dropout_p: float = 0.0
    dropout_seed: int = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        dtype = accumulation_type(q.dtype)
        out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
        wide_k, wide_v = k.to(dtype), v.to(dtype)
        for rows, keep in self._tiles(q, k):
            scores = self._scores(q, wide_k, rows)
            lse[:, :, rows] = scores.logsumexp(-1)
            probs = _probabilities(scores, lse[:, :, rows])
            out[:, :, rows] = _times(probs if keep is None else probs * keep, wide_v)
        return out, lse, None

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Any
    ) -> Gradients:
        dtype = accumulation_type(q.dtype)
        wide_k, wide_v, wide_grad = k.to(dtype), v.to(dtype), grad.to(dtype)
        dq = q.new_empty(q.shape, dtype=dtype)
        dk, dv = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
        # The gradient of a softmax: dS = P (dP - rowsum(dO O)); the sum over keys is known from the whole result.
        mean = (wide_grad * out).sum(-1, keepdim=True)
        for rows, keep in self._tiles(q, k):
            probs = _probabilities(self._scores(q, wide_k, rows), lse[:, :, rows])
            row_grad = wide_grad[:, :, rows]
            grad_probs = _times(row_grad, wide_v.transpose(-1, -2))
            if keep is not None:
                grad_probs = grad_probs * keep
            dv += _grouped_product(probs if keep is None else probs * keep, row_grad, v)
            grad_scores = probs * (grad_probs - mean[:, :, rows]) * self.scale
            dq[:, :, rows] = _times(grad_scores, wide_k)
            dk += _grouped_product(grad_scores, q[:, :, rows].to(dtype), k)
        return dq, dk, dv

    def _tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
        """Ranges of queries, and what dropout multiplies their probabilities with: the same in every call."""
        n, m = q.size(2), k.size(2)
        generator = None
        if self.dropout_p > 0.0:
            generator = torch.Generator(q.device).manual_seed(self.dropout_seed)
        step = max(1, min(n, TILE // m))
        for start in range(0, n, step):
            rows, keep = slice(start, min(start + step, n)), None
            if generator is not None:
                shape = (*q.shape[:2], rows.stop - start, m)
                kept = torch.rand(shape, device=q.device, generator=generator) >= self.dropout_p
                keep = kept.to(accumulation_type(q.dtype)) / (1.0 - self.dropout_p)
            yield rows, keep

    def _scores(self, q: Tensor, wide_k: Tensor, rows: slice) -> Tensor:
        """[b, a, rows, m], -inf where a key is hidden."""
        scores = _times(q[:, :, rows].to(wide_k.dtype) * self.scale, wide_k.transpose(-1, -2))
        if self.block.order is not Order.ALL:
            scores.masked_fill_(self._outside(rows, wide_k.size(2), q.device), -math.inf)
        if self.hidden is not None:
            hidden = self.hidden if self.hidden.size(2) == 1 else self.hidden[:, :, rows]
            scores.masked_fill_(hidden, -math.inf)
        return scores

    def _outside(self, rows: slice, m: int, device: torch.device) -> Tensor:
        """[rows, m] bool, True where the order hides a key."""
        distance = 0 if self.block.order is Order.CAUSAL else self.block.distance
        window = (-1, 0) if self.block.order is Order.CAUSAL else self.window
        return outside_window(torch.arange(rows.start, rows.stop, device=device) + distance, m, window)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """[b, a, n, i] times [b, g, i, j] -> [b, a, n, j]: heads of a group share `y`, which is not repeated."""
    b, a, n, i = x.shape
    g = y.size(1)
    product = torch.bmm(x.reshape(b * g, a // g * n, i), y.reshape(b * g, *y.shape[2:]))
    return product.view(b, a, n, -1)


def _grouped_product(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """xᵀ y, [b, a, n, m] and [b, a, n, d] -> [b, g, m, d], summed over the heads of a group."""
    b, g, m, d = like.shape
    left = x.reshape(b * g, -1, m).transpose(1, 2)
    return torch.bmm(left, y.reshape(b * g, -1, d)).view(b, g, m, d)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see no key at all; in place."""
    return scores.sub_(lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp_()


# --- choice --------------------------------------------------------------------------------------------------------


def fused_kernel(q: Tensor, scale: float, is_causal: bool) -> BlockKernel | None:
    """The fused kernel that takes such queries, without a mask or dropout; None where none does."""
    d = q.size(-1)
    if q.device.type == "cpu":
        # CPUs emulate fp16 products; those written out are fp32.
        return None if q.dtype is torch.float16 else FusedCpuKernel(scale, is_causal)
    if q.device.type != "cuda":
        return None
    if q.dtype in (torch.float16, torch.bfloat16) and d % 8 == 0 and d <= 256 and _has_flash(q.device):
        return FlashCudaKernel(scale, is_causal)
    if q.dtype in (torch.float16, torch.bfloat16, torch.float32) and d % 8 == 0:
        return EfficientCudaKernel(scale, is_causal)
    return None


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block to the results of other keys, in place: out [b, a, n, d] and lse [b, a, n] of accumulation type."""
    total = torch.logaddexp(lse, block_lse)
    safe = total.masked_fill(total == -math.inf, 0.0)  # -inf - -inf is nan; a query without keys stays 0
    out.mul_((lse - safe).exp_().unsqueeze(-1))
    out.addcmul_(block_out.to(out.dtype), (block_lse - safe).exp_().unsqueeze(-1))
    lse.copy_(total)
