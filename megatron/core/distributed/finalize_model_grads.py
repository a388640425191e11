"""What has to happen to gradients between the last backward and the optimizer step (each once, in this order)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from megatron.core import device
from megatron.core.collectives import all_reduce, broadcast
from megatron.core.fp8.delayed import update_delayed_scales
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.stage_placement import Placement, placement_shape
from megatron.core.timers import timed
from megatron.core.transformer.moe.router import TopKRouter, update_expert_bias
from megatron.core.utils import get_attr_wrapped_model, get_model_config, get_pg_size, groups_of


def finalize_model_grads(
    model: list[nn.Module], num_tokens: Tensor | None = None, groups: ProcessGroupCollection | None = None
) -> None:
    """Complete the gradients of all model chunks, in place in `main_grad`; over the groups they were built with.

    Communicates, in this order: the data parallel reduction; over the tensor parallel group the sum of
    gradients of parameters that each rank used on a part of the sequence; over the embedding groups the sum
    of the tied embeddings' gradients; the tokens of each expert, where routers have a bias that follows them;
    with `num_tokens` (the tokens this rank's loss was summed over) their total, by which all gradients are
    divided; with delayed scaling in fp8 the maxima of this step, from which the next one's scales follow.
    """
    groups = groups or groups_of(model[0])
    config = get_model_config(model[0])
    with timed(config, "all-grads-sync", log_level=1):
        for chunk in model:
            chunk.finish_grad_sync()  # type: ignore[operator]
    with timed(config, "non-tensor-parallel-grads-all-reduce", log_level=1):
        _reduce_sequence_parallel_grads(model, config, groups.tp)
    with timed(config, "embedding-grads-all-reduce", log_level=1):
        _reduce_shared_grads(model, groups.embd, _shared_word_embedding)
        _reduce_grads_of_stacks(model, groups)
    if getattr(config, "moe_router_enable_expert_bias", False):
        update_expert_bias([router for router in _routers(model) if router.expert_bias is not None], groups)
    for router in _routers(model):
        router.begin_batch()
    if num_tokens is not None:
        _divide_by_tokens(model, num_tokens, groups)
    update_delayed_scales(model, groups)


def _routers(model: list[nn.Module]) -> list[TopKRouter]:
    return [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]


def _gradient(param: nn.Parameter) -> Tensor | None:
    grad = param.main_grad if hasattr(param, "main_grad") else param.grad
    return grad.to_local() if isinstance(grad, DTensor) else grad  # fully sharded: the rows that this rank keeps


def _trained(model: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for chunk in model:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                yield name, param


def _reduce_sequence_parallel_grads(model: list[nn.Module], config: Any, group: ProcessGroup | None) -> None:
    """Sum what the ranks of a tensor parallel group computed on different tokens, or on different heads."""
    if get_pg_size(group) == 1:
        return
    # Norms of latents see all heads on every rank; those of heads only the rank's own.
    head_norms = getattr(config, "qk_layernorm", False) and not getattr(config, "multi_latent_attention", False)
    partial = [
        grad
        for name, param in _trained(model)
        if (
            (config.sequence_parallel and getattr(param, "sequence_parallel", False))
            or (head_norms and ("q_layernorm" in name or "k_layernorm" in name))
        )
        and (grad := _gradient(param)) is not None
    ]
    _coalesced_sum(partial, group)


def _coalesced_sum(tensors: list[Tensor], group: ProcessGroup | None) -> None:
    """One all-reduce for each dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):  # in the same order on every rank
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        all_reduce(flat, group=group, what="gradients of parameters that tensor parallel ranks share")
        for tensor, summed in zip(same, flat.split([t.numel() for t in same])):
            tensor.copy_(summed.view_as(tensor))


def _shared_word_embedding(chunk: nn.Module) -> nn.Parameter | None:
    bare: Any = get_attr_wrapped_model(chunk, "both_ends_embed", return_model_obj=True)
    if not bare.both_ends_embed():
        return None
    return bare.shared_embedding_or_output_weight()


def _reduce_grads_of_stacks(model: list[nn.Module], groups: ProcessGroupCollection) -> None:
    """Sum the gradients of what stages of a model of two stacks hold copies of (see `T5Model`), over the first stages
    of the stacks, or over all stages; a stage of the other stack has nothing to add."""
    try:
        bare: Any = get_attr_wrapped_model(model[0], "weights_of_both_stacks", return_model_obj=True)
    except RuntimeError:  # a model of one stack
        return
    for param in bare.weights_of_both_stacks():
        if (grad := _gradient(param)) is not None:
            all_reduce(grad, group=groups.pos_embd, what="gradients of embeddings of both stacks")
    tables = bare.weights_of_every_stage()
    held = [param for param in tables.values() if param is not None]
    if get_pg_size(groups.pp) == 1 or not held:
        return
    for param in tables.values():
        grad = _gradient(held[0] if param is None else param)
        assert grad is not None
        nothing_or_grad = torch.zeros_like(grad) if param is None else grad
        all_reduce(nothing_or_grad, group=groups.pp, what="gradients of relative positions")


def _reduce_shared_grads(
    model: list[nn.Module], group: ProcessGroup | None, find: Callable[[nn.Module], nn.Parameter | None]
) -> None:
    """Sum the gradients of a parameter of which several stages, on this rank or others, hold a copy."""
    if group is None:
        return
    copies = list(dict.fromkeys(copy for chunk in model for copy in _found(find, chunk)))
    grads = [grad for copy in copies if (grad := _gradient(copy)) is not None]
    if not grads:
        return
    total, *others = grads
    for grad in others:
        total.add_(grad)
    if get_pg_size(group) > 1:
        all_reduce(total, group=group, what="gradients of tied embeddings")
    for grad in others:
        grad.copy_(total)


def _found(find: Callable[[nn.Module], nn.Parameter | None], chunk: nn.Module) -> list[nn.Parameter]:
    try:
        param = find(chunk)
    except RuntimeError:  # a model without such an embedding
        return []
    return [] if param is None else [param]


def _divide_by_tokens(model: list[nn.Module], num_tokens: Tensor, groups: ProcessGroupCollection) -> None:
    """Divide every gradient by the tokens of the whole batch, which the last stage knows."""
    shape = placement_shape(get_model_config(model[0]).pipeline_schedule)
    last_rank = Placement(get_pg_size(groups.pp), len(model), shape).last_rank
    total = num_tokens.to(device.current_device(), torch.int64).clone()  # whatever type the last stage counts in
    if get_pg_size(groups.pp) > 1:
        broadcast(total, group_src=last_rank, group=groups.pp, what="number of tokens")
    if get_pg_size(groups.dp_cp) > 1:
        all_reduce(total, group=groups.dp_cp, what="number of tokens")
    scaling = 1.0 / max(float(total), 1.0)
    for chunk in model:
        chunk.scale_gradients(scaling)  # type: ignore[operator]
