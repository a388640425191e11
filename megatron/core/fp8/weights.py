"""Weights that are kept in fp8 (`fp8_param`): which ones, their scales, their casts.

A linear layer with one scale a tensor casts its weight in every product, always to the same bytes, since weights change
once a step. Here the optimizer casts them once, its ranks each their part, and the layer multiplies the bytes. Values
are rounded to the model's type before, as weights that are kept in that type are: both ways give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.collectives import all_reduce
from megatron.core.fp8.products import WEIGHT, WEIGHT_TYPE, Fp8Products
from megatron.core.fp8.quantization import cast, largest_magnitude
from megatron.core.utils import get_pg_size


def keep_in_fp8(param: Parameter, products: Sequence[Fp8Products]) -> None:
    """Mark a matrix, or a stack of as many matrices as there are `products`, as one that may be kept so."""
    param.fp8_products = tuple(products)  # type: ignore[attr-defined]


def is_kept_in_fp8(param: Tensor) -> bool:
    """Whether `keep_in_fp8` marked it."""
    return hasattr(param, "fp8_products")


@dataclass(frozen=True)
class Piece:
    """Elements `[start, end)` of a flattened parameter, on their way from the optimizer to the model."""

    param: Parameter
    start: int
    end: int
    values: Tensor
    """[end - start], in the model's type."""
    stored: Tensor
    """[end - start], where the bytes go, e4m3."""

    def matrices(self) -> Iterator[tuple[int, slice]]:
        """(number of a matrix in the stack, its elements within the piece)."""
        numel = self.param.numel() // len(self.param.fp8_products)  # type: ignore[attr-defined]
        for i in range(self.start // numel, -(-self.end // numel)):
            yield i, slice(max(0, i * numel - self.start), min(self.end, (i + 1) * numel) - self.start)


def cast_weights(params: Sequence[Parameter], pieces: Sequence[Piece], owners: ProcessGroup | None) -> None:
    """Fill `stored` of all pieces, and tell each layer the scale of its weight.

    Communicates: all-reduces of a number for each matrix, over the ranks that own pieces and those that hold other
    parts of the same matrix.

    Args:
        params: all that the ranks of `owners` hold pieces of, in the same order on each.
        owners: ranks that between them hold all elements of each parameter.
    """
    number = {}
    products: list[Fp8Products] = []
    for param in params:
        number[param] = len(products)
        products += param.fp8_products  # type: ignore[attr-defined]
    if not products:
        return
    largest = torch.zeros(len(products), device=params[0].device)
    for piece in pieces:
        for i, elements in piece.matrices():
            one = number[piece.param] + i
            largest[one] = products[one].run(largest_magnitude)(piece.values[elements])
    for group in (owners, *_groups_of_parts(products)):
        if get_pg_size(group) > 1:
            all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group, what="maxima of weights for fp8")
    scales = [own.keep_weight(magnitude) for own, magnitude in zip(products, largest.unbind())]
    for piece in pieces:
        for i, elements in piece.matrices():
            one = number[piece.param] + i
            piece.stored[elements] = products[one].run(cast)(piece.values[elements], scales[one], WEIGHT_TYPE)


def _groups_of_parts(products: Sequence[Fp8Products]) -> Sequence[ProcessGroup]:
    """Those over which weights are cut: the same for all of an optimizer, since experts have one of their own where
    their tensor parallel size differs."""
    found = {tuple(id(group) for group in own.groups[WEIGHT]): own.groups[WEIGHT] for own in products}
    return max(found.values(), key=len)
