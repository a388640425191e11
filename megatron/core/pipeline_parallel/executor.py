"""Runs the steps of one pipeline stage: forward and backward of microbatches, and the exchanges between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.pipeline_parallel.p2p_communication import Shape, exchange
from megatron.core.pipeline_parallel.schedule import Compute, Direction, Exchange, Step, Transfer
from megatron.core.process_groups_config import default_process_groups
from megatron.core.timers import timed
from megatron.core.utils import get_attr_wrapped_model, get_pg_rank

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


def forward_step(
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
                output_tensor, num_tokens, report = _scaled_loss(loss_func(output_tensor), num_microbatches, config)
                forward_data_store.append(report)
    return output_tensor, num_tokens


def _scaled_loss(outputs: tuple[Any, ...], num_microbatches: int, config: Any) -> tuple[Tensor, Tensor | int, Any]:
    if len(outputs) == 3:
        loss, num_tokens, report = outputs
        if not config.calculate_per_token_loss:
            loss = loss * config.context_parallel_size / _tokens_of_samples(num_tokens, config) / num_microbatches
        return loss, num_tokens, report
    if len(outputs) != 2:
        raise ValueError(f"a loss function returns 2 or 3 values, not {len(outputs)}")
    loss, report = outputs
    return loss * config.context_parallel_size / num_microbatches, 0, report


def _tokens_of_samples(num_tokens: Tensor | int, config: Any) -> Tensor:
    """Tokens of the microbatch on all context parallel ranks, at least 1. Communicates: all-reduce over them.

    Each of these ranks has the loss of other tokens of the same samples. Their gradients are averaged like those of
    other samples, so that a loss times their number, divided by all tokens, gives the mean over all tokens, however
    unevenly the tokens that count lie on the ranks.
    """
    total = torch.as_tensor(num_tokens)
    if config.context_parallel_size > 1:
        total = total.to(device.current_device(), torch.int64, copy=True)
        dist.all_reduce(total, group=default_process_groups().cp)
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


@dataclass
class StageExecutor:
    """One stage's share of a training or evaluation step."""

    forward_step_func: ForwardStepFunction
    data_iterator: Any
    model: nn.Module
    config: Any
    num_microbatches: int
    tensor_shape: Shape
    """Shape of what crosses a border, [s/tp, b, h] with sequence parallelism."""
    group: ProcessGroup | None
    is_last_stage: bool
    is_forward_only: bool
    collect_non_loss_data: bool = False

    reports: list[Any] = field(default_factory=list)
    """What the loss function reported, one entry a microbatch."""
    num_tokens: Tensor | int = 0
    _inputs: dict[int, Tensor] = field(default_factory=dict)
    _outputs: dict[int, Tensor] = field(default_factory=dict)
    _output_grads: dict[int, Tensor] = field(default_factory=dict)
    _input_grads: dict[int, Tensor] = field(default_factory=dict)

    def run(self, steps: list[Step]) -> None:
        """All steps in order; gradient traffic is held back until the last backward.

        With `config.grad_sync_func` all stages begin it together, when the first stage is in its last backward:
        the others end theirs earlier, and communicate while they would wait for the first one.
        """
        no_sync = self.config.no_sync_func or contextlib.nullcontext
        start_grad_sync = None if self.is_forward_only else self.config.grad_sync_func
        last_backward = max(
            (i for i, s in enumerate(steps) if isinstance(s, Compute) and s.direction is Direction.BACKWARD),
            default=-1,
        )
        if start_grad_sync is not None and get_pg_rank(self.group) > 0:
            with no_sync():
                for step in steps:
                    self._run_step(step)
            start_grad_sync()
            return
        with no_sync():
            for step in steps[:last_backward] if last_backward >= 0 else steps:
                self._run_step(step)
        for step in steps[last_backward:] if last_backward >= 0 else []:
            self._run_step(step)

    def _run_step(self, step: Step) -> None:
        if isinstance(step, Exchange):
            self._exchange(step.transfers)
        elif step.direction is Direction.FORWARD:
            self._forward(step.microbatch)
        else:
            self._backward(step.microbatch)

    def _forward(self, microbatch: int) -> None:
        output, tokens = forward_step(
            self.forward_step_func,
            self.data_iterator,
            self.model,
            self.num_microbatches,
            self._inputs.get(microbatch),
            self.reports,
            self.config,
            is_last_stage=self.is_last_stage,
            collect_non_loss_data=self.collect_non_loss_data,
        )
        self.num_tokens = self.num_tokens + tokens
        if not self.is_forward_only or not self.is_last_stage:
            self._outputs[microbatch] = output
        if self.is_forward_only:
            self._inputs.pop(microbatch, None)

    def _backward(self, microbatch: int) -> None:
        grad = backward_step(
            self._inputs.pop(microbatch, None),
            self._outputs.pop(microbatch),
            self._output_grads.pop(microbatch, None),
            None,
            self.config,
        )
        if grad is not None:
            self._input_grads[microbatch] = grad

    def _exchange(self, transfers: tuple[Transfer, ...]) -> None:
        sends = [(self._outgoing(t), t.peer) for t in transfers if t.is_send]
        receives = [t for t in transfers if not t.is_send]
        assert self.group is not None
        with timed(self.config, _timer_name(transfers)):
            received = exchange(sends, [(self.tensor_shape, t.peer) for t in receives], self.config, self.group)
        for transfer, tensor in zip(receives, received):
            target = self._inputs if transfer.direction is Direction.FORWARD else self._output_grads
            target[transfer.microbatch] = tensor
        for transfer in transfers:
            if transfer.is_send and transfer.direction is Direction.FORWARD:
                self._release_output(transfer.microbatch)

    def _outgoing(self, transfer: Transfer) -> Tensor:
        if transfer.direction is Direction.FORWARD:
            return self._outputs[transfer.microbatch]
        return self._input_grads.pop(transfer.microbatch)

    def _release_output(self, microbatch: int) -> None:
        if self.is_forward_only:
            del self._outputs[microbatch]
        else:
            deallocate_output_tensor(self._outputs[microbatch], self.config.deallocate_pipeline_outputs)


def _timer_name(transfers: tuple[Transfer, ...]) -> str:
    """E.g. `forward-send-backward-recv`."""
    return "-".join(f"{t.direction.name.lower()}-{'send' if t.is_send else 'recv'}" for t in transfers)
