"""One training iteration: forward and backward of all microbatches, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.activity import activity
from megatron.core.collectives import all_reduce
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.aux_loss import (
    get_moe_layer_wise_logging_tracker,
    mean_aux_losses,
    names_of_aux_losses,
    track_layers,
)
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training.device_memory import release_unused
from megatron.training.flops import num_moe_layers
from megatron.training.global_vars import get_args, get_timers
from megatron.training.nan_check import FiniteCheck, begin_step, can_replay, replay

Reports = list[dict[str, Tensor]]


@dataclass
class StepResult:
    """What an iteration gave."""

    losses: dict[str, float]
    """Mean losses of the global batch; empty except on the last pipeline stage."""
    skipped: bool
    """The optimizer rejected the gradients (overflow of the fp16 loss scale)."""
    grad_norm: float | None
    num_zeros: int | None


def reduce_reports(reports: Reports, add_up: bool = False) -> dict[str, Tensor]:
    """Losses of several microbatches as one, over the data parallel group. Communicates: all-reduce.

    A report of two numbers is (sum, tokens): sums are added, then divided. A report of one number is a mean
    that the loss function has reduced over the group already: these are averaged.

    Args:
        add_up: leave (sum, tokens) undivided, and means as (sum, count), for adding to other steps.
    """
    totals: dict[str, Tensor] = {}
    for name in reports[0] if reports else {}:
        entries = [torch.as_tensor(report[name]).detach().float().reshape(-1) for report in reports]
        if entries[0].numel() == 2:
            total = torch.stack(entries).sum(0)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            all_reduce(total, group=group, what="losses")
        else:
            mean = torch.cat(entries)
            total = torch.stack([mean.sum(), mean.new_tensor(float(mean.numel()))])
        totals[name] = total
    return totals if add_up else {name: t[0] / t[1].clamp(min=1) for name, t in totals.items()}


def train_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    config: Any,
    finite: FiniteCheck | None = None,
) -> StepResult:
    """Run one iteration and advance optimizer and schedule.

    Raises:
        NonFiniteLoss: `finite` is given and a loss or gradient of any rank is not; on all ranks, before the step.
    """
    args, timers = get_args(), get_timers()
    for chunk in model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()
    if finite is not None:
        forward_step_func = finite.watching(forward_step_func)
        begin_step(data_iterator)
    run = partial(
        get_forward_backward_func(),
        forward_step_func=forward_step_func,
        model=model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
    )
    reports = run(data_iterator=data_iterator, forward_only=False)
    release_unused(args, level=1)
    if finite is not None:
        finite.agree(model, stages_of(model), lambda: run_again(run, data_iterator))
    timers("optimizer", log_level=1).start(barrier=args.barrier_with_L1_time)
    with activity("optimizer"):
        success, grad_norm, num_zeros = optimizer.step()
    timers("optimizer").stop()
    release_unused(args, level=2)
    if success:
        samples = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
        opt_param_scheduler.step(increment=samples)
    losses = {name: float(value) for name, value in reduce_reports(reports).items()}
    if args.num_experts:
        of_routers = router_losses(args)
        losses |= of_routers if losses else {}
    if args.mtp_num_layers:
        of_further_tokens = MTPLossLoggingHelper.mean_losses(args.mtp_num_layers)
        losses |= {f"mtp_{k} loss": mean for k, mean in enumerate(of_further_tokens, 1)} if losses else {}
    return StepResult(losses, not success, grad_norm, None if num_zeros is None else int(num_zeros))


def forget_further_losses() -> None:
    """Begin without the losses that an earlier run of this process has noted beside the model's own."""
    get_moe_layer_wise_logging_tracker().clear()
    MTPLossLoggingHelper.sums = None


def router_losses(args: Any) -> dict[str, float]:
    """Losses of the routers, averaged over layers, with `--moe-per-layer-logging` each; on every rank, see there."""
    named: dict[str, float] = {}
    track_layers(names_of_aux_losses(args), args.num_layers + (args.mtp_num_layers or 0))
    for name, (mean, by_layer) in mean_aux_losses(get_num_microbatches(), num_moe_layers(args)).items():
        named[name] = float(mean)
        if args.moe_per_layer_logging:
            named |= {f"moe/{name}_layer_{i}": float(value) for i, value in enumerate(by_layer) if value}
    return named


def stages_of(model: list[nn.Module]) -> list[int]:
    """Where each chunk of this rank stands in the order of the forward pass."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return [parallel_state.get_pipeline_model_parallel_rank() + stages * chunk for chunk in range(len(model))]


def run_again(run: Callable[..., Any], data_iterator: Any) -> bool:
    """The forward pass of the step once more; whether its batches are still there. All ranks come here together."""
    can_run = can_replay(data_iterator)
    if can_run:
        run(data_iterator=replay(data_iterator), forward_only=True)
    return can_run
