"""The public door to pipeline execution: `get_forward_backward_func()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.executor import StageExecutor
from megatron.core.pipeline_parallel.interleaving import (
    convert_schedule_table_to_order,
    get_pp_rank_microbatches,
    get_schedule_table,
)
from megatron.core.pipeline_parallel.microbatch import (
    ForwardStepFunction,
    backward_step,
    custom_backward,
    deallocate_output_tensor,
    run_forward,
    set_current_microbatch,
    set_input_tensor,
)
from megatron.core.pipeline_parallel.orders import ScheduleName, ScheduleRequest
from megatron.core.pipeline_parallel.output_weight_grads import (
    clear_embedding_activation_buffer,
    finish_embedding_wgrad_compute,
    finish_output_weight_grads,
)
from megatron.core.pipeline_parallel.p2p_communication import (
    recv_backward,
    recv_forward,
    send_backward,
    send_backward_recv_forward,
    send_forward,
    send_forward_recv_backward,
)
from megatron.core.pipeline_parallel.p2p_transport import Shape
from megatron.core.pipeline_parallel.plan import PipelinePlan, plan_pipeline
from megatron.core.pipeline_parallel.schedule import Direction
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.timers import timed
from megatron.core.utils import divide, get_attr_wrapped_model, get_model_config, get_pg_rank, get_pg_size, groups_of

__all__ = [
    "backward_step",
    "check_first_val_step",
    "clear_embedding_activation_buffer",
    "convert_schedule_table_to_order",
    "custom_backward",
    "deallocate_output_tensor",
    "finish_embedding_wgrad_compute",
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
    "forward_step",
    "get_forward_backward_func",
    "get_pp_rank_microbatches",
    "get_schedule_table",
    "get_tensor_shapes",
    "recv_backward",
    "recv_forward",
    "send_backward",
    "send_backward_recv_forward",
    "send_forward",
    "send_forward_recv_backward",
    "set_current_microbatch",
    "set_input_tensor",
]


def get_forward_backward_func(pp_size: int | None = None, vp_size: int | None = None) -> Callable[..., list[Any]]:
    """The function that runs forward and backward of all microbatches of a step, in the groups of its model.

    Args:
        pp_size: pipeline ranks; without it, those of the process-wide groups.
        vp_size: model chunks of a rank; without it and `pp_size`, those of the process-wide layout.

    It takes keyword arguments only:

    - forward_step_func(data_iterator, model) -> (output tensor, loss_func). The loss_func(output tensor) of
      the last stage returns (loss sum, number of tokens, report), or (loss, report).
    - data_iterator, model: one each, or a list with one for each model chunk; num_microbatches; seq_length;
      micro_batch_size.
    - decoder_seq_length: of models with an encoder, whose length is seq_length; unused by models of one stack.
    - forward_only: evaluate, no backward.
    - collect_non_loss_data: call loss_func(output tensor, non_loss_data=True) and return what it gives.
    - first_val_step: unused.
    - adjust_tensor_shapes_fn(receive shapes, send shapes) -> the two changed, lists with one shape each.

    It returns the reports of all microbatches on the rank with the last stage, an empty list elsewhere. Gradients end
    up in `main_grad` (or `.grad` without data-parallel wrapper), reduced if `config.finalize_model_grads_func` is
    set.
    """
    if pp_size is None:
        pp_size = get_pg_size(default_process_groups().pp) if has_default_process_groups() else 1
        vp_size = vp_size or parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if pp_size == 1:
        return forward_backward_no_pipelining
    if vp_size is not None:
        return forward_backward_pipelining_with_interleaving
    return forward_backward_pipelining_without_interleaving


def get_tensor_shapes(
    *,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None,
    config: Any,
    rank: int | None = None,
    model_type: Any = None,
    encoder_decoder_xattn: bool = False,
) -> list[tuple[int, int, int]]:
    """Shapes of what crosses from pipeline rank `rank` to the next, [s/cp (/tp with sequence parallelism), b, h].

    With `encoder_decoder_xattn` a stage of a decoder passes two tensors: its hidden states and the encoder's output.
    Stages before `config.pipeline_model_parallel_split_rank` are the encoder's. `model_type` is kept for the public
    interface.
    """
    lengths = [seq_length]
    if encoder_decoder_xattn and (rank or 0) >= (config.pipeline_model_parallel_split_rank or 0):
        if decoder_seq_length is None:
            raise ValueError("decoder_seq_length must be given for a model with an encoder and a decoder")
        lengths = [decoder_seq_length, seq_length]
    parts = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    return [(divide(length, parts), micro_batch_size, config.hidden_size) for length in lengths]


def forward_step(
    forward_step_func: ForwardStepFunction,
    data_iterator: Any,
    model: nn.Module,
    num_microbatches: int,
    input_tensor: Tensor | None,
    forward_data_store: list[Any],
    config: Any,
    collect_non_loss_data: bool = False,
    checkpoint_activations_microbatch: bool | None = None,
    is_first_microbatch: bool = False,
    current_microbatch: int | None = None,
    encoder_decoder_xattn: bool = False,
    vp_stage: int | None = None,
) -> tuple[Tensor, Tensor | int]:
    """Forward of one microbatch: (output or scaled loss, number of tokens), see `run_forward`."""
    if checkpoint_activations_microbatch is not None:
        raise NotImplementedError("checkpoint_activations_microbatch: partial recompute by microbatch is not built yet")
    if is_first_microbatch and hasattr(model, "set_is_first_microbatch"):
        model.set_is_first_microbatch()  # type: ignore[operator]
    if current_microbatch is not None:
        set_current_microbatch(model, current_microbatch)
    return run_forward(
        forward_step_func,
        data_iterator,
        model,
        num_microbatches,
        input_tensor,
        forward_data_store,
        config,
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        collect_non_loss_data=collect_non_loss_data,
    )


def check_first_val_step(first_val_step: bool | None, forward_only: bool, cond: bool) -> bool:
    """`cond`, in evaluation only of the first step where that is told."""
    return bool(first_val_step) and cond if first_val_step is not None and forward_only else cond


# --- running a step ---


def schedule_request(
    config: Any, num_ranks: int, num_chunks: int, num_microbatches: int, forward_only: bool = False
) -> ScheduleRequest:
    """What a configuration asks for."""
    name: ScheduleName = "interleaved" if num_chunks > 1 else "1f1b"
    if config.pipeline_schedule != "auto" and num_ranks > 1:
        name = config.pipeline_schedule
    splits = config.delay_wgrad_compute and name not in ("zb-h1", "zb-v")
    group_size = config.microbatch_group_size_per_vp_stage if name == "interleaved" else None
    return ScheduleRequest(name, num_ranks, num_microbatches, num_chunks, group_size, forward_only, splits)


def plan_for(config: Any, request: ScheduleRequest) -> PipelinePlan:
    """The checked plan of a step; the same on every rank."""
    # Nobody can receive ahead what he does not know the length of.
    overlap = config.overlap_p2p_comm and not config.variable_seq_lengths
    return plan_pipeline(request, overlap=overlap, overlap_warmup_flush=config.overlap_p2p_comm_warmup_flush)


def _one_for_each(value: Any, count: int, what: str) -> list[Any]:
    if value is None:
        return [None] * count
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) != count:
        raise ValueError(f"{len(values)} {what} for {count} model chunks; give a list with one for each")
    return values


def _border_shapes(
    config: Any, sizes: dict[str, Any], rank: int, adjust: Callable[..., tuple[list[Shape], list[Shape]]] | None
) -> dict[Direction, Shape]:
    """What a stage receives in each direction: activations as they are sent to it, gradients as it sent activations."""
    received = _joined(get_tensor_shapes(config=config, rank=max(rank - 1, 0), **sizes))
    sent = _joined(get_tensor_shapes(config=config, rank=rank, **sizes))
    if adjust is not None:
        received, sent = adjust(received, sent)
        if len(received) != 1 or len(sent) != 1:
            raise NotImplementedError("adjust_tensor_shapes_fn: stages exchange one tensor in each direction")
    return {Direction.FORWARD: received[0], Direction.BACKWARD: sent[0]}


def _joined(shapes: list[tuple[int, int, int]]) -> list[Shape]:
    """The tensors of a stage travel as one, behind each other along the sequence."""
    return [(sum(shape[0] for shape in shapes), *shapes[0][1:])]


def _run_stage(
    *,
    pipelined: bool,
    forward_step_func: ForwardStepFunction,
    data_iterator: Iterator[Any] | list[Iterator[Any]],
    model: nn.Module | list[nn.Module],
    num_microbatches: int,
    seq_length: int = 0,
    micro_batch_size: int = 0,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Callable[..., tuple[list[Shape], list[Shape]]] | None = None,
) -> list[Any]:
    """This rank's share of a step; arguments as in `get_forward_backward_func`."""
    chunks: list[nn.Module] = list(model) if isinstance(model, (list, tuple)) else [model]
    config = get_model_config(chunks[0])
    group = groups_of(chunks[0]).pp if pipelined else None
    request = schedule_request(config, get_pg_size(group), len(chunks), num_microbatches, forward_only)
    sizes = {
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
        "decoder_seq_length": decoder_seq_length,
        "encoder_decoder_xattn": _has_cross_attention(chunks[0]),
    }
    executor = StageExecutor(
        forward_step_func=forward_step_func,
        data_iterators=_one_for_each(data_iterator, len(chunks), "data iterators"),
        chunks=chunks,
        config=config,
        num_microbatches=num_microbatches,
        shapes=_border_shapes(config, sizes, get_pg_rank(group), adjust_tensor_shapes_fn) if pipelined else {},
        group=group,
        rank=get_pg_rank(group),
        placement=request.placement,
        is_forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
    with torch.set_grad_enabled(not forward_only), timed(config, "forward-backward", log_level=1):
        executor.run(plan_for(config, request).steps[executor.rank])
        if not forward_only:
            finish_output_weight_grads(config, chunks)
    if config.finalize_model_grads_func is not None and not forward_only:
        config.finalize_model_grads_func(chunks, _token_count(executor, config))
    return executor.reports


def _has_cross_attention(chunk: nn.Module) -> bool:
    """Whether stages of the model pass on the output of an encoder too."""
    try:
        return bool(get_attr_wrapped_model(chunk, "xattn_needed"))
    except RuntimeError:  # a model of one stack
        return False


def _token_count(executor: StageExecutor, config: Any) -> Tensor | None:
    if not config.calculate_per_token_loss:
        return None
    return torch.as_tensor(executor.num_tokens)


forward_backward_no_pipelining = partial(_run_stage, pipelined=False)
"""All microbatches one after the other on a single stage."""

forward_backward_pipelining_without_interleaving = partial(_run_stage, pipelined=True)
"""One chunk on each rank of the pipeline group: 1F1B, or the schedule of `config.pipeline_schedule`."""

forward_backward_pipelining_with_interleaving = partial(_run_stage, pipelined=True)
"""Several chunks on each rank of the pipeline group: interleaved 1F1B, or the schedule of
`config.pipeline_schedule`."""
