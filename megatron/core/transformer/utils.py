"""The helper names that the public interface promises in this module."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.process_groups_config import (
    ProcessGroupCollection,
    default_process_groups,
    has_default_process_groups,
)
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

Offsets = tuple[tuple[int, int, int], ...]


def groups_or_default(groups: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """`groups`, else the process-wide ones, else none at all (a process on its own)."""
    if groups is not None:
        return groups
    return default_process_groups() if has_default_process_groups() else ProcessGroupCollection()


# --- attention masks ---


@functools.lru_cache(maxsize=8)
def get_default_causal_mask(sq: int, device: torch.device | None = None) -> Tensor:
    """[sq, sq] bool, True above the diagonal: what a position may not see."""
    return torch.ones(sq, sq, dtype=torch.bool, device=device).triu_(1)


@functools.lru_cache(maxsize=8)
def get_sliding_window_mask(
    sq: int, sk: int, window_size: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """[sq, sk] bool, True outside the window `[i - left, i + right]` around each query i (arXiv:2004.05150).

    -1 is no limit on that side. With fewer queries than keys the queries are the last positions.
    """
    return outside_window(torch.arange(sk - sq, sk, device=device), sk, window_size)


def outside_window(queries: Tensor, sk: int, window_size: tuple[int, int]) -> Tensor:
    """[sq, sk] bool, True outside the window around each of `queries` [sq], which count on the axis of the keys."""
    left, right = window_size
    query, key = queries[:, None], torch.arange(sk, device=queries.device)[None, :]
    outside = torch.zeros(len(queries), sk, dtype=torch.bool, device=queries.device)
    if left >= 0:
        outside |= key < query - left
    if right >= 0:
        outside |= key > query + right
    return outside


def attention_mask_func(attention_scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores with -10000 where the mask is True."""
    return attention_scores.masked_fill(attention_mask, -10000.0)


def of_layer(values: Any, layer_number: int) -> Any:
    """The entry of layer `layer_number` (from 1) in a list by layers; layers behind the last are like it."""
    return values[min(layer_number, len(values)) - 1]


# --- activations ---


def gelu_impl(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel, arXiv:1606.08415)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def openai_gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU that GPT-2 was trained with."""
    return gelu_impl(x)


def erf_gelu(x: Tensor) -> Tensor:
    """Exact GELU, x Φ(x), written with erf."""
    return x * 0.5 * (torch.erf(x / math.sqrt(2.0)) + 1.0)


# --- modules ---


def get_linear_layer(
    rows: int, columns: int, init_method: Callable[[Tensor], Any], perform_initialization: bool = True
) -> nn.Linear:
    """A linear layer rows -> columns that every rank holds whole, its bias zero."""
    layer = nn.Linear(rows, columns)
    with torch.no_grad():
        if perform_initialization:
            init_method(layer.weight)
        layer.bias.zero_()
    return layer


def set_model_to_sequence_parallel(model: nn.Module, set_to: bool = False) -> None:
    """Switch sequence parallelism of a built model on or off, e.g. between training and inference."""
    variants: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(module, "sequence_parallel"):
            module.sequence_parallel = set_to  # type: ignore[assignment]
        if hasattr(module, "scatter_to_sequence_parallel"):
            module.scatter_to_sequence_parallel = set_to  # type: ignore[assignment]
        config = getattr(module, "config", None)
        if config is not None and config.sequence_parallel != set_to:
            variant = variants.setdefault(id(config), copy.copy(config))
            variant.sequence_parallel = set_to
            module.config = variant


# --- checkpoints ---


def make_sharded_tensors_for_checkpoint(
    state_dict: dict[str, Any],
    prefix: str,
    tensor_parallel_layers_axis_map: dict[str, int] | None = None,
    sharded_offsets: Iterable[tuple[int, int, int]] = (),
    extra_state_suffix: str = "_extra_state",
) -> ShardedStateDict:
    """A sharded description of each entry of one module's own state dict.

    Args:
        state_dict: entries of the module itself, names without prefix.
        prefix: goes before the names to make the keys.
        tensor_parallel_layers_axis_map: axis along which a tensor is sharded over the tensor parallel group;
            tensors not named are whole on every rank.
        sharded_offsets: axes to put in front, as (axis, offset, size).
        extra_state_suffix: entries whose name ends so are objects.
    """
    axis_of = tensor_parallel_layers_axis_map or {}
    offsets = tuple(sharded_offsets)
    sharded: ShardedStateDict = {}
    for name, value in state_dict.items():
        key = prefix + name
        if name.endswith(extra_state_suffix):
            sharded[key] = make_sharded_object_for_checkpoint(value, key, offsets)
        elif name in axis_of:
            sharded[key] = make_tp_sharded_tensor_for_checkpoint(value, key, axis_of[name], prepend_offsets=offsets)
        else:
            sharded[key] = make_sharded_tensor_for_checkpoint(value, key, prepend_offsets=offsets)
    return sharded


def make_sharded_object_for_checkpoint(
    obj: Any,
    key: str,
    sharded_offsets: Iterable[tuple[int, int, int]] = (),
    replica_id: int | tuple[int, ...] | None = None,
    **kwargs: Any,
) -> ShardedObject:
    """A sharded description of something that is not a tensor and is equal on all tensor and data parallel
    ranks."""
    if replica_id is None:
        tp_rank = dp_rank = 0
        if has_default_process_groups():
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        replica_id = (0, tp_rank, dp_rank)
    shape, offset = _get_extra_state_offsets(sharded_offsets)
    return ShardedObject(key, obj, shape, offset, replica_id, **kwargs)


def _get_extra_state_offsets(
    sharded_offsets: Iterable[tuple[int, int, int]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global shape and offset of an object in the grid of the axes put in front."""
    ordered = sorted(sharded_offsets)
    if not ordered:
        return (1,), (0,)
    return tuple(size for _, _, size in ordered), tuple(offset for _, offset, _ in ordered)


def sharded_state_dict_default(
    module: nn.Module,
    prefix: str = "",
    sharded_offsets: Offsets = (),
    metadata: dict[str, Any] | None = None,
) -> ShardedStateDict:
    """The module's own `sharded_state_dict`, or, for plain torch modules, one that says every rank holds all
    of it."""
    own = getattr(module, "sharded_state_dict", None)
    if own is not None:
        return own(prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata)
    return make_sharded_tensors_for_checkpoint(module.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


def draws_for_tokens(config: TransformerConfig) -> bool:
    """Whether training draws random numbers for each token: to drop it out, or to route it."""
    dropout = config.hidden_dropout > 0 or config.attention_dropout > 0
    jitter = config.moe_input_jitter_eps is not None or config.moe_router_force_load_balancing
    return dropout or (config.num_moe_experts is not None and jitter)
