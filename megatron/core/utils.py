"""The helper names that the public interface promises in this module."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.process_groups_config import (
    ProcessGroupCollection,
    default_process_groups,
    has_default_process_groups,
)


def divide(numerator: int, denominator: int) -> int:
    """`numerator / denominator`, which must be exact.

    Raises:
        ValueError: it is not.
    """
    if numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")
    return numerator // denominator


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return (value + multiple - 1) // multiple * multiple


# --- process groups ---


def get_pg_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks of `group`; 1 for None and where torch.distributed does not run."""
    return group.size() if group is not None and dist.is_initialized() else 1


def get_pg_rank(group: ProcessGroup | None = None) -> int:
    """Place of this rank in `group`; 0 for None and where torch.distributed does not run."""
    return group.rank() if group is not None and dist.is_initialized() else 0


def get_tensor_model_parallel_group_if_none(
    tp_group: ProcessGroup | None, is_expert: bool = False, check_initialized: bool = True
) -> ProcessGroup | None:
    """`tp_group`, or the default tensor parallel group; None where there is none (a group of one)."""
    if tp_group is not None or not has_default_process_groups():
        return tp_group
    groups = default_process_groups()
    return groups.expt_tp if is_expert else groups.tp


def groups_of(model: torch.nn.Module | None) -> ProcessGroupCollection:
    """The groups that `model` (or what it wraps) was built with; else the process-wide ones; else none at all."""
    found: Any = model
    while found is not None:
        groups = getattr(found, "model_comm_pgs", None)
        if groups is not None:
            return groups
        found = getattr(found, "module", None)
    return default_process_groups() if has_default_process_groups() else ProcessGroupCollection()


# --- initialisers ---


class NormalInit:
    """Fills a tensor from N(0, std); blockwise, so that part of a tensor can be drawn without the rest."""

    blockwise = sequential = True

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=self.std)

    def __repr__(self) -> str:
        return f"normal(std={self.std:g})"


def init_method_normal(sigma: float) -> Callable[[Tensor], Tensor]:
    """Initialiser N(0, sigma)."""
    return NormalInit(sigma)


def scaled_init_method_normal(sigma: float, num_layers: int, multiplier: float = 2.0) -> Callable[[Tensor], Tensor]:
    """Initialiser N(0, sigma / sqrt(multiplier * num_layers)) of projections back into the residual stream."""
    return NormalInit(sigma / math.sqrt(multiplier * num_layers))


# --- modules and configs ---


def get_attr_wrapped_model(
    model: torch.nn.Module | list[torch.nn.Module],
    attr: str,
    allow_none: bool = True,
    return_model_obj: bool = False,
) -> Any:
    """Attribute `attr` of a model, or of the nearest model inside its wrappers (`.module`) that has it.

    Raises:
        RuntimeError: a list was given, or no wrapped model has the attribute.
    """
    if isinstance(model, list):
        raise RuntimeError("get_attr_wrapped_model takes one model, not a list of chunks")
    found: Any = model
    while not hasattr(found, attr) or (not allow_none and getattr(found, attr) is None):
        if not hasattr(found, "module"):
            raise RuntimeError(f"{type(model).__name__} and the models it wraps have no attribute {attr!r}")
        found = found.module
    return found if return_model_obj else getattr(found, attr)


def get_model_config(model: torch.nn.Module) -> Any:
    """The `config` of a model, wrapped or not."""
    return get_attr_wrapped_model(model, "config", allow_none=False)


def unwrap_model(model: torch.nn.Module | list[torch.nn.Module]) -> Any:
    """The bare model inside data-parallel and precision wrappers; a list gives a list."""
    if isinstance(model, list):
        return [unwrap_model(chunk) for chunk in model]
    bare: Any = model
    while hasattr(bare, "module") and getattr(bare, "is_wrapper", True):
        bare = bare.module
    return bare


def make_viewless_tensor(inp: Tensor, requires_grad: bool, keep_graph: bool) -> Tensor:
    """`inp` itself if it owns its storage, else a tensor of the same data that is not a view.

    Freeing a pipeline output's data frees nothing while a base tensor keeps it alive.
    """
    if inp._base is None:
        return inp
    if keep_graph:
        return _Viewless.apply(inp, requires_grad)
    return _viewless(inp, requires_grad)


def _viewless(inp: Tensor, requires_grad: bool) -> Tensor:
    out = torch.empty((1,), dtype=inp.dtype, device=inp.device, requires_grad=requires_grad)
    out.data = inp.data
    return out


class _Viewless(torch.autograd.Function):
    """Identity whose output is not a view; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, requires_grad: bool) -> Tensor:
        return _viewless(inp, requires_grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# --- checkpoints ---


def make_tp_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    tp_axis: int = 0,
    replica_id: tuple[int, int, int] | None = None,
    prepend_offsets: tuple[tuple[int, int, int], ...] = (),
    *,
    tp_group: ProcessGroup | None = None,
    dp_cp_group: ProcessGroup | None = None,
    **kwargs: Any,
) -> Any:
    """`ShardedTensor` of a tensor sharded along `tp_axis` over the tensor parallel group, replicated over data."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    tp_group, dp_cp_group = _checkpoint_groups(tp_group, dp_cp_group)
    offset = (tp_axis + len(prepend_offsets), get_pg_rank(tp_group), get_pg_size(tp_group))
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *prepend_offsets,
        offset,
        replica_id=(0, 0, get_pg_rank(dp_cp_group)) if replica_id is None else replica_id,
        prepend_axis_num=len(prepend_offsets),
        **kwargs,
    )


def make_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    prepend_offsets: tuple[tuple[int, int, int], ...] = (),
    replica_id: tuple[int, int, int] | None = None,
    *,
    tp_group: ProcessGroup | None = None,
    dp_cp_group: ProcessGroup | None = None,
    **kwargs: Any,
) -> Any:
    """`ShardedTensor` of a tensor that every tensor and data parallel rank holds whole."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    tp_group, dp_cp_group = _checkpoint_groups(tp_group, dp_cp_group)
    replica = (0, get_pg_rank(tp_group), get_pg_rank(dp_cp_group))
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *prepend_offsets,
        replica_id=replica if replica_id is None else replica_id,
        prepend_axis_num=len(prepend_offsets),
        **kwargs,
    )


def make_replicated_sharded_object(
    obj: object,
    key: str,
    prepend_offsets: tuple[tuple[int, int, int], ...] = (),
    *,
    tp_group: ProcessGroup | None = None,
    dp_cp_group: ProcessGroup | None = None,
) -> Any:
    """`ShardedObject` of something that every tensor and data parallel rank holds alike."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    tp_group, dp_cp_group = _checkpoint_groups(tp_group, dp_cp_group)
    replica = (0, get_pg_rank(tp_group), get_pg_rank(dp_cp_group))
    ordered = sorted(prepend_offsets) or [(0, 0, 1)]
    grid, cell = tuple(size for _, _, size in ordered), tuple(offset for _, offset, _ in ordered)
    return ShardedObject(key, obj, grid, cell, replica_id=replica)


def _checkpoint_groups(
    tp_group: ProcessGroup | None, dp_cp_group: ProcessGroup | None
) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    if not has_default_process_groups():
        return tp_group, dp_cp_group
    groups = default_process_groups()
    return tp_group or groups.tp, dp_cp_group or groups.dp_cp


# --- batches ----------------------------------------------------------------------------------------------------


def get_batch_on_this_cp_rank(batch: dict[str, Any], cp_group: ProcessGroup | None = None) -> dict[str, Any]:
    """The part of each tensor's sequence dimension that this context parallel rank works on.

    The sequence is seen as 2·cp chunks; rank c keeps chunks c and 2·cp - 1 - c, which balances causal attention.
    Tensors are [b, s, ...]; `attention_mask` is [b, 1, s, s] and cut along its rows (left as it is with
    one row for all queries). Entries that are None stay None.
    """
    if cp_group is None and has_default_process_groups():
        cp_group = default_process_groups().cp
    size, rank = get_pg_size(cp_group), get_pg_rank(cp_group)
    if size == 1:
        return batch
    chunks = (rank, 2 * size - 1 - rank)

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dim = 2 if name == "attention_mask" else 1
        if name == "attention_mask" and value.size(dim) == 1:  # the same for all queries
            return value
        parts = value.split(divide(value.size(dim), 2 * size), dim)
        return torch.cat([parts[i] for i in chunks], dim)

    return {name: cut(name, value) for name, value in batch.items()}


# --- the rest ---


def log_single_rank(logger: logging.Logger, *args: Any, rank: int = 0, **kwargs: Any) -> None:
    """`logger.log(*args)` on one rank only."""
    if not dist.is_initialized() or dist.get_rank() == rank:
        logger.log(*args, **kwargs)


def is_torch_min_version(version: str, check_equality: bool = True) -> bool:
    """Whether torch is at least `version` (or, without `check_equality`, newer)."""
    return _at_least(torch.__version__, version, check_equality)


def is_te_min_version(version: str, check_equality: bool = True) -> bool:
    """Whether Transformer Engine is installed in at least `version`."""
    return _at_least(_installed_version("transformer-engine"), version, check_equality)


def is_fa_min_version(version: str, check_equality: bool = True) -> bool:
    """Whether flash-attn is installed in at least `version`."""
    return _at_least(_installed_version("flash-attn"), version, check_equality)


def get_te_version() -> str | None:
    """Version of Transformer Engine, None where it is not installed."""
    return _installed_version("transformer-engine")


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _at_least(found: str | None, wanted: str, check_equality: bool) -> bool:
    if found is None:
        return False
    return _numbers(found) >= _numbers(wanted) if check_equality else _numbers(found) > _numbers(wanted)


def _numbers(version_text: str) -> tuple[int, ...]:
    """Major, minor and micro version; what is appended to them (`a0`, `+cu128`) does not count."""
    parts = [re.match(r"\d*", part) for part in version_text.split(".")[:3]]
    numbers = [int(part[0] or 0) for part in parts if part]
    return tuple(numbers + [0] * (3 - len(numbers)))


class GlobalMemoryBuffer:
    """Tensors by name that are allocated once and reused while they are large enough."""

    def __init__(self) -> None:
        self.buffer: dict[tuple[str, torch.dtype], Tensor] = {}

    def get_tensor(
        self,
        tensor_shape: tuple[int, ...] | list[int],
        dtype: torch.dtype,
        name: str,
        device: torch.device | None = None,
    ) -> Tensor:
        """An uninitialised tensor; its contents last until the same name is asked for again."""
        numel = math.prod(tensor_shape)
        known = self.buffer.get((name, dtype))
        if known is None or known.numel() < numel:
            known = torch.empty(numel, dtype=dtype, device=device, requires_grad=False)
            self.buffer[name, dtype] = known
        return known[:numel].view(*tensor_shape)


def check_param_hashes_across_dp_replicas(model: list[torch.nn.Module], cross_check: bool = False) -> bool:
    """Whether all data parallel replicas hold bitwise the same parameters. Communicates: gathers one hash a rank.

    Args:
        cross_check: every rank learns the answer; else it is right on the first rank of each group only.
    """
    digest = hashlib.sha256()
    for chunk in model:
        for name, param in chunk.named_parameters():
            digest.update(name.encode())
            digest.update(param.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    group = groups_of(model[0]).dp_cp
    hashes: list[str | None] = [None] * get_pg_size(group)
    dist.all_gather_object(hashes, digest.hexdigest(), group=group)
    return len(set(hashes)) == 1 or not (cross_check or get_pg_rank(group) == 0)
