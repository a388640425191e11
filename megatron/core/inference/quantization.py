"""A model's weights in 8 or 4 bits, for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from megatron.core.tensor_parallel.gemm import PLAIN_PRODUCTS
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.quantized_weight import KINDS, QuantizedWeight
from megatron.core.transformer.moe.experts import GroupedMLP

KINDS_OF_WEIGHTS = tuple(KINDS)
"""What weights can be stored as."""
HEAD = "output_layer"


@dataclass(frozen=True)
class Quantized:
    """What `quantize_weights` has done on this rank."""

    layers: int
    bytes_before: int
    """Of their weights."""
    bytes_after: int


def quantize_weights(chunks: Sequence[nn.Module], kind: str) -> Quantized:
    """Store the weights of all linear layers as `kind`; the model can only be run forward from then on.

    Embeddings, the output layer, norms, biases, routers and convolutions stay as they are. Communicates: an all-reduce
    of a number a row for each layer whose rows are cut, over its tensor parallel group.

    Args:
        chunks: this rank's model, with its final weights.
        kind: int8, int4 or fp8; see `quantized_weight`.

    Raises:
        ValueError: the kind is unknown, a size does not fit it, or experts are stacked.
    """
    modules = [(name, module) for chunk in chunks for name, module in chunk.named_modules()]
    if any(isinstance(module, GroupedMLP) for _, module in modules):
        raise ValueError("quantized weights: experts in one stack have none; leave --moe-grouped-gemm out")
    found = []
    for name, layer in modules:
        is_linear = isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer.weight is not None
        if is_linear and name.rsplit(".", 1)[-1] != HEAD:
            found.append(_quantize_layer(name, layer, kind))
    return Quantized(len(found), sum(before for before, _ in found), sum(after for _, after in found))


def _quantize_layer(name: str, layer: ColumnParallelLinear | RowParallelLinear, kind: str) -> tuple[int, int]:
    """(bytes before, bytes after)."""
    if layer.overlap is not None:
        raise ValueError("quantized weights: no overlap of tensor parallel communication; leave --tp-comm-overlap out")
    if layer.products is not PLAIN_PRODUCTS:
        raise ValueError("quantized weights: products are of the weights' own type; leave --fp8-format out")
    weight = layer.weight
    assert weight is not None
    try:
        stored = QuantizedWeight(weight, kind, layer.tp_group if isinstance(layer, RowParallelLinear) else None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    del layer._parameters["weight"]
    layer.weight = stored  # type: ignore[assignment]
    return weight.nbytes, stored.nbytes
