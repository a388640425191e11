"""Tokens that come from several ranks, brought into the order of the sample, and back. b microbatch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megatron.core.transformer.context_parallel.layout import SequenceLayout, positions


@lru_cache(maxsize=64)
def order_of_tokens(layout: SequenceLayout, ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Where in the tokens of `ranks`, one rank behind the other, those of growing positions are.

    Returns:
        int64 [n], or [n, b] where the samples lie differently.
    """
    columns = []
    for row in range(len(layout.pieces)):
        places = torch.tensor([p for rank in ranks for p in positions(layout.row(row), rank)])
        columns.append(places.argsort())
    order = torch.stack(columns, dim=1) if len(columns) > 1 else columns[0]
    return order.to(device)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """[n, b or 1, ...] with the tokens that `order` names, in that order."""
    if order.dim() == 1:
        return x.index_select(0, order)
    return x.expand(-1, order.size(1), *x.shape[2:])[order, torch.arange(order.size(1), device=order.device)]


def inverse(order: Tensor) -> Tensor:
    """What brings tokens back from `order`."""
    return order.argsort(0)
