"""A model's weights in the order in which a CPU reads them fastest when few tokens are computed at a time.

A product with one row reads each number of a weight once, so what counts is how fast they come from memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.inference.huge_pages import put_into_huge_pages
from megatron.core.tensor_parallel.gemm import PLAIN_PRODUCTS
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.stored_weight import PackedWeight, StoredWeight, can_pack
from megatron.core.transformer.mlp import MLP
from megatron.core.utils import unwrap_model

READ_ELSEWHERE = "linear_kv_up_proj"
"""Latent attention takes its weight apart."""


def order_weights(chunks: Sequence[nn.Module]) -> None:
    """On a CPU: weights of linear layers as oneDNN packs them, in huge pages; without oneDNN those with more rows than
    columns by columns.

    The model can only be run forward from then on. An output layer that shares its weight with the embedding gets a
    copy: so many bytes more. Weights that are quantized, multiplied in fp8 or with communication meanwhile stay as they
    are.

    Args:
        chunks: this rank's model, with its final weights.
    """
    for chunk in chunks:
        model = unwrap_model(chunk)
        head = getattr(model, "output_layer", None)
        is_tied = getattr(model, "share_embeddings_and_output_weights", False)
        if is_tied and isinstance(head, ColumnParallelLinear) and head.products is PLAIN_PRODUCTS:
            shared = model.shared_embedding_or_output_weight()
            if shared.device.type == "cpu" and head.weight is None:
                _put(head, shared)
                model.share_embeddings_and_output_weights = False
        for name, layer in model.named_modules():
            is_linear = isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer is not head
            is_linear = is_linear and layer.products is PLAIN_PRODUCTS and layer.overlap is None
            if is_linear and not name.endswith(READ_ELSEWHERE) and isinstance(layer.weight, nn.Parameter):
                _put(layer, layer.weight)
        for module in model.modules():
            if isinstance(module, MLP):
                _fuse_gelu(module)


def _fuse_gelu(block: MLP) -> None:
    """Have the first product of a feed-forward block end with its activation, if both can."""
    first = block.linear_fc1
    if isinstance(getattr(first, "weight", None), PackedWeight) and block.activate is bias_gelu_impl:
        first.weight.applies_gelu, first.skip_bias_add = True, False
        block.activate = lambda activated, no_bias: activated


def _put(layer: ColumnParallelLinear | RowParallelLinear, weight: Tensor) -> None:
    if weight.device.type != "cpu":
        return
    found: nn.Parameter | StoredWeight | None = layer.weight
    if can_pack(weight):
        found = PackedWeight(weight)
        put_into_huge_pages(found.packed)
    elif weight.size(0) > weight.size(1):
        found = nn.Parameter(weight.detach().t().contiguous().t(), requires_grad=False)
    elif found is None:
        found = nn.Parameter(weight.detach(), requires_grad=False)
    layer._parameters.pop("weight", None)
    layer.weight = found  # type: ignore[assignment]
