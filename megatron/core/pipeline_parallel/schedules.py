"""The public door to pipeline execution: `get_forward_backward_func()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.pipeline_parallel.executor import (
    ForwardStepFunction,
    StageExecutor,
    backward_step,
    custom_backward,
    deallocate_output_tensor,
    forward_step,
    set_input_tensor,
)
from megatron.core.pipeline_parallel.p2p_communication import (
    recv_backward,
    recv_forward,
    send_backward,
    send_backward_recv_forward,
    send_forward,
    send_forward_recv_backward,
)
from megatron.core.pipeline_parallel.schedule import stage_steps
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.timers import timed
from megatron.core.utils import divide, get_model_config, get_pg_rank, get_pg_size

__all__ = [
    "backward_step",
    "custom_backward",
    "deallocate_output_tensor",
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_step",
    "get_forward_backward_func",
    "get_tensor_shapes",
    "recv_backward",
    "recv_forward",
    "send_backward",
    "send_backward_recv_forward",
    "send_forward",
    "send_forward_recv_backward",
    "set_input_tensor",
]


def get_forward_backward_func() -> Callable[..., list[Any]]:
    """The function that runs forward and backward of all microbatches of a step in the present layout.

    It takes keyword arguments only:

    - forward_step_func(data_iterator, model) -> (output tensor, loss_func). The loss_func(output tensor) of
      the last stage returns (loss sum, number of tokens, report), or (loss, report).
    - data_iterator, model: one each, or a list of one; num_microbatches; seq_length; micro_batch_size.
    - decoder_seq_length: unused by models of one stack.
    - forward_only: evaluate, no backward.
    - collect_non_loss_data: call loss_func(output tensor, non_loss_data=True) and return what it gives.
    - first_val_step: unused.

    It returns the reports of all microbatches on the last stage, an empty list elsewhere. Gradients end up in
    `main_grad` (or `.grad` without data-parallel wrapper), reduced if `config.finalize_model_grads_func` is
    set.
    """
    stages = get_pg_size(default_process_groups().pp) if has_default_process_groups() else 1
    return forward_backward_pipelining_without_interleaving if stages > 1 else forward_backward_no_pipelining


def _only(value: Any, what: str) -> Any:
    if isinstance(value, list):
        if len(value) != 1:
            raise NotImplementedError(f"{len(value)} {what}: the interleaved schedule is not built yet; give one")
        return value[0]
    return value


def get_tensor_shapes(
    *, seq_length: int, micro_batch_size: int, decoder_seq_length: int | None, config: Any
) -> list[tuple[int, int, int]]:
    """Shapes of what crosses from one stage to the next, [s/cp (/tp with sequence parallelism), b, h]."""
    length = divide(seq_length, config.context_parallel_size)
    if config.sequence_parallel:
        length = divide(length, config.tensor_model_parallel_size)
    return [(length, micro_batch_size, config.hidden_size)]


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
    adjust_tensor_shapes_fn: None = None,
) -> list[Any]:
    """This rank's share of a step; arguments as in `get_forward_backward_func`."""
    chunk = _only(model, "model chunks")
    config = get_model_config(chunk)
    group = default_process_groups().pp if pipelined else None
    stage, num_stages = get_pg_rank(group), get_pg_size(group)
    shape: tuple[int, ...] = ()
    if pipelined:
        (shape,) = get_tensor_shapes(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            config=config,
        )
    executor = StageExecutor(
        forward_step_func=forward_step_func,
        data_iterator=_only(data_iterator, "data iterators"),
        model=chunk,
        config=config,
        num_microbatches=num_microbatches,
        tensor_shape=shape,
        group=group,
        is_last_stage=stage == num_stages - 1,
        is_forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
    steps = stage_steps(stage, num_stages, num_microbatches, forward_only)
    with torch.set_grad_enabled(not forward_only), timed(config, "forward-backward", log_level=1):
        executor.run(steps)
    if config.finalize_model_grads_func is not None and not forward_only:
        config.finalize_model_grads_func([chunk], _token_count(executor, config))
    return executor.reports


def _token_count(executor: StageExecutor, config: Any) -> Tensor | None:
    if not config.calculate_per_token_loss:
        return None
    return torch.as_tensor(executor.num_tokens)


forward_backward_no_pipelining = partial(_run_stage, pipelined=False)
"""All microbatches one after the other on a single stage."""

forward_backward_pipelining_without_interleaving = partial(_run_stage, pipelined=True)
"""One-forward-one-backward over the pipeline group."""
