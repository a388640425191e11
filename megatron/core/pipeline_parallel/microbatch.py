"""Forward and backward of one microbatch on one model chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import all_reduce
from megatron.core.timers import timed
from megatron.core.transformer.moe.aux_loss import MoEAuxLossAutoScaler
from megatron.core.utils import get_attr_wrapped_model, get_pg_size, groups_of

LossFunction = Callable[..., Any]
ForwardStepFunction = Callable[..., tuple[Tensor, LossFunction]]


def deallocate_output_tensor(out: Tensor | None, deallocate_pipeline_outputs: bool = False) -> None:
    """Free the data of an output that has been sent; only its place in the graph is still needed."""
    if out is None or not deallocate_pipeline_outputs:
        return
    if out._base is not None:
        raise RuntimeError("a pipeline output must not be a view: freeing it would free nothing")
    out.data = torch.empty((1,), device=out.device, dtype=out.dtype)


def custom_backward(output: Tensor, grad_output: Tensor | None) -> None:
    """`torch.autograd.backward` without its check that output and gradient have equal shapes.

    The data of `output` has been freed, so its shape is no longer that of the gradient.
    """
    if grad_output is None:
        if output.numel() != 1:
            raise RuntimeError("an output without a gradient must be a scalar loss")
        grad_output = torch.ones_like(output, memory_format=torch.preserve_format)
    torch.autograd.Variable._execution_engine.run_backward(
        tensors=(output,),
        grad_tensors=(grad_output,),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def set_input_tensor(model: nn.Module, input_tensor: Tensor | None) -> None:
    """Hand a stage the activations it received."""
    get_attr_wrapped_model(model, "set_input_tensor")(input_tensor)


def set_current_microbatch(model: nn.Module, microbatch_id: int | None) -> None:
    """Tell a model's transformer layers which microbatch of the step they see, in `layer.current_microbatch`."""
    try:
        decoder = get_attr_wrapped_model(model, "decoder")
    except RuntimeError:  # a model without transformer layers
        return
    for layer in getattr(decoder, "layers", ()):
        layer.current_microbatch = microbatch_id


def run_forward(
    forward_step_func: ForwardStepFunction,
    data_iterator: Any,
    model: nn.Module,
    num_microbatches: int,
    input_tensor: Tensor | None,
    forward_data_store: list[Any],
    config: Any,
    *,
    is_last_stage: bool,
    collect_non_loss_data: bool = False,
) -> tuple[Tensor, Tensor | int]:
    """Forward of one microbatch: (output or scaled loss, number of tokens).

    On the last stage the loss function is called and what it reports is appended to `forward_data_store`. It
    returns (loss sum, tokens, report) or (loss, report). The first kind is divided by its tokens (a sum over all
    context parallel ranks by the tokens of all of them) and by the number of microbatches, unless
    `config.calculate_per_token_loss`: then gradients are divided by all tokens at the end.
    """
    set_input_tensor(model, input_tensor)
    _announce_loss_scale(num_microbatches, config)
    autocast = (
        torch.autocast(device.device_type(), dtype=config.autocast_dtype)
        if config.enable_autocast
        else contextlib.nullcontext()
    )
    with timed(config, "forward-compute"), autocast:
        output_tensor, loss_func = forward_step_func(data_iterator, model)
        num_tokens: Tensor | int = 0
        if is_last_stage:
            if collect_non_loss_data:
                forward_data_store.append(loss_func(output_tensor, non_loss_data=True))
            else:
                output_tensor, num_tokens, report = _scaled_loss(
                    loss_func(output_tensor), num_microbatches, config, groups_of(model).cp
                )
                forward_data_store.append(report)
    return output_tensor, num_tokens


def _announce_loss_scale(num_microbatches: int, config: Any) -> None:
    """Losses that layers add of themselves (a router's, of further tokens) weigh in backward as the model's own."""
    if not (getattr(config, "num_moe_experts", None) or getattr(config, "mtp_num_layers", None)):
        return
    scale = 1.0 if config.calculate_per_token_loss else config.context_parallel_size / num_microbatches
    if config.grad_scale_func is not None:
        MoEAuxLossAutoScaler.set_loss_scale(config.grad_scale_func(torch.tensor(scale, device=device.current_device())))
    else:
        MoEAuxLossAutoScaler.set_loss_scale(scale)


def _scaled_loss(
    outputs: tuple[Any, ...], num_microbatches: int, config: Any, cp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor | int, Any]:
    if len(outputs) == 3:
        loss, num_tokens, report = outputs
        if not config.calculate_per_token_loss:
            loss = loss * config.context_parallel_size / _tokens_of_samples(num_tokens, cp_group) / num_microbatches
        return loss, num_tokens, report
    if len(outputs) != 2:
        raise ValueError(f"a loss function returns 2 or 3 values, not {len(outputs)}")
    loss, report = outputs
    return loss * config.context_parallel_size / num_microbatches, 0, report


def _tokens_of_samples(num_tokens: Tensor | int, cp_group: ProcessGroup | None) -> Tensor:
    """Tokens of the microbatch on all context parallel ranks, at least 1. Communicates: all-reduce over them.

    Each of these ranks has the loss of other tokens of the same samples. Their gradients are averaged like those of
    other samples, so that a loss times their number, divided by all tokens, gives the mean over all tokens, however
    unevenly the tokens that count lie on the ranks.
    """
    total = torch.as_tensor(num_tokens)
    if get_pg_size(cp_group) > 1:
        total = total.to(device.current_device(), torch.int64, copy=True)
        all_reduce(total, group=cp_group, what="token counts")
    return total.clamp(min=1)


def backward_step(
    input_tensor: Tensor | None,
    output_tensor: Tensor,
    output_tensor_grad: Tensor | None,
    model_type: Any,
    config: Any,
) -> Tensor | None:
    """Backward of one microbatch; the gradient of its input, None on the first stage."""
    with timed(config, "backward-compute"):
        if input_tensor is not None:
            input_tensor.retain_grad()
        if output_tensor_grad is None and config.grad_scale_func is not None:
            output_tensor = config.grad_scale_func(output_tensor)
        if config.deallocate_pipeline_outputs and output_tensor_grad is not None:
            custom_backward(output_tensor, output_tensor_grad)
        else:
            torch.autograd.backward(output_tensor, grad_tensors=output_tensor_grad)
    return None if input_tensor is None else input_tensor.grad
