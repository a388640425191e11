"""Tokens in the order of their experts, and back. n tokens, E experts, h hidden size; m rows, one for each pair of a
token and an expert that was chosen for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def permute(tokens: Tensor, chosen: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(rows [m, h], their weights [m], the token [m] of each row): experts in order, in each the tokens in order.

    Args:
        tokens: [n, h].
        chosen: [n, E] bool.
        weights: [n, E].
    """
    by_expert = chosen.t()
    source = torch.arange(chosen.size(0), device=chosen.device).expand_as(by_expert).masked_select(by_expert)
    rows = tokens.index_select(0, source)
    return rows, None if weights is None else weights.t().masked_select(by_expert), source


class _SumOfRows(torch.autograd.Function):
    """torch's `index_add`, whose backward needs the places only, and not the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(source)
        return rows.new_zeros(num_tokens, rows.size(1)).index_add_(0, source, rows)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return grad_output.index_select(0, source), None, None


def unpermute(rows: Tensor, source: Tensor, num_tokens: int) -> Tensor:
    """[num_tokens, h]: the sum of each token's rows. `source` is that of `permute`."""
    return _SumOfRows.apply(rows, source, num_tokens)


def sort_chunks_by_idxs(
    input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Rows cut into chunks of `split_sizes`, put into the order `sorted_idxs`; `probs` [m] likewise.

    `fused` is kept for the public interface: it is one gather either way.
    """
    index = chunk_order(split_sizes, sorted_idxs, len(input))
    return input.index_select(0, index), None if probs is None else probs.index_select(0, index)


def chunk_order(sizes: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """[m]: which row comes where, if chunks of `sizes` are put into `order`."""
    starts = sizes.cumsum(0) - sizes
    taken = sizes[order]
    shift = starts[order] - (taken.cumsum(0) - taken)
    return torch.arange(num_rows, device=sizes.device) + shift.repeat_interleave(taken, output_size=num_rows)
