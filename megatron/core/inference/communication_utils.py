"""What crosses the stages of a pipeline besides activations, and what all ranks of a model must agree on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives, device, parallel_state
from megatron.core.activity import communicating
from megatron.core.process_groups_config import has_default_process_groups
from megatron.core.utils import get_pg_rank, get_pg_size


def broadcast_from_last_pipeline_stage(
    size: list[int], dtype: torch.dtype, tensor: Tensor | None = None, pp_group: ProcessGroup | None = None
) -> Tensor:
    """The last stage's `tensor` on all stages. Communicates: a broadcast over the pipeline group.

    Raises:
        ValueError: the last stage's tensor has another size or type.
    """
    group = pp_group or parallel_state.get_pipeline_model_parallel_group()
    if get_pg_size(group) == 1:
        assert tensor is not None
        return tensor
    source = _last_stage(group)
    if get_pg_rank(group) == source:
        if tensor is None or list(tensor.shape) != list(size) or tensor.dtype is not dtype:
            raise ValueError(f"the last stage has {tensor if tensor is None else tensor.shape}, not {size} of {dtype}")
        shared = tensor.contiguous()
    else:
        shared = torch.empty(size, dtype=dtype, device=device.current_device())
    collectives.broadcast(shared, source, group, what="logits")
    return shared


def _last_stage(group: ProcessGroup) -> int:
    """Rank of the last stage in the pipeline group: not always its last rank."""
    if group is parallel_state.get_pipeline_model_parallel_group(check_initialized=False):
        return parallel_state.stage_placement().last_rank
    return get_pg_size(group) - 1


def recv_from_prev_pipeline_rank_(recv_buffer: Tensor, pp_group: ProcessGroup | None = None) -> None:
    """Fill `recv_buffer` with what the previous rank of the pipeline group sends."""
    group = pp_group or parallel_state.get_pipeline_model_parallel_group()
    source = (get_pg_rank(group) - 1) % get_pg_size(group)
    with communicating("receive", group, peer=source, of="activations"):
        torch.distributed.recv(recv_buffer, group=group, group_src=source)


def send_to_next_pipeline_rank(tensor: Tensor, pp_group: ProcessGroup | None = None) -> None:
    """Send `tensor` to the next rank of the pipeline group."""
    group = pp_group or parallel_state.get_pipeline_model_parallel_group()
    target = (get_pg_rank(group) + 1) % get_pg_size(group)
    with communicating("send", group, peer=target, of="activations"):
        torch.distributed.send(tensor.contiguous(), group=group, group_dst=target)


def decides() -> bool:
    """This rank draws for all ranks of its model: the last of the tensor parallel ranks of the last stage."""
    if not has_default_process_groups():
        return True
    group = parallel_state.get_model_parallel_group()
    return get_pg_rank(group) == _deciding_rank()


def share_decision(values: Tensor | None, size: list[int]) -> Tensor:
    """[*size] fp64 on the CPU: the `values` of the rank that `decides`, on all ranks of its model.

    Communicates: a broadcast over the tensor x pipeline parallel group.
    """
    if not has_default_process_groups() or get_pg_size(parallel_state.get_model_parallel_group()) == 1:
        assert values is not None
        return values.cpu()
    shared = torch.empty(size, dtype=torch.float64, device=device.current_device())
    if decides():
        assert values is not None
        shared.copy_(values)
    collectives.broadcast(shared, _deciding_rank(), parallel_state.get_model_parallel_group(), what="drawn tokens")
    return shared.cpu()


def _deciding_rank() -> int:
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    return parallel_state.stage_placement().last_rank * tp_size + tp_size - 1
