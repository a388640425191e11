"""Loss on held-out data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import device, parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.device_memory import release_unused
from megatron.training.global_vars import get_args, get_timers, get_trackers
from megatron.training.train_step import reduce_reports
from megatron.training.utils import print_rank_0, print_rank_last


@dataclass(frozen=True)
class HeldOut:
    """Data to evaluate on, as every rank knows of it."""

    data: Any
    """Iterator over microbatches, or one for each model chunk; None where nothing is read."""
    num_batches: int
    """Global batches of one evaluation."""
    name: str = ""
    """Tells it from others of its kind."""


def evaluate(
    forward_step_func: Callable[..., Any],
    held_out: HeldOut,
    model: list[nn.Module],
    *,
    verbose: bool = False,
    deadline: float | None = None,
) -> tuple[dict[str, float], int] | None:
    """(mean losses over the batches of `held_out` without dropout, samples seen); losses only on the last stage.

    Stops with None at `deadline` (Unix time), on all ranks alike. Communicates: as training's forward.
    """
    args = get_args()
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if verbose:
        print_rank_0(f"Evaluating on {held_out.num_batches * args.global_batch_size} samples")
    totals: dict[str, Tensor] = {}
    try:
        for i in range(held_out.num_batches):
            if verbose and (i + 1) % args.log_interval == 0:
                print_rank_0(f"Evaluating iter {i + 1}/{held_out.num_batches}")
            reports = get_forward_backward_func()(
                forward_step_func=forward_step_func,
                data_iterator=held_out.data,
                model=model,
                num_microbatches=num_microbatches,
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                decoder_seq_length=args.decoder_seq_length,
                forward_only=True,
            )
            release_unused(args, level=1)
            for name, total in reduce_reports(reports, add_up=True).items():
                totals[name] = totals[name] + total if name in totals else total
            if deadline is not None and _any_rank(time.time() > deadline):
                print_rank_0("Exiting during evaluation, timelimit reached")
                return None
    finally:
        for chunk, training in zip(model, was_training):
            chunk.train(training)
    losses = {name: float(total[0] / total[1].clamp(min=1)) for name, total in totals.items()}
    return losses, held_out.num_batches * num_microbatches * args.micro_batch_size * args.data_parallel_size


def _any_rank(condition: bool) -> bool:
    flag = torch.tensor(int(condition), device=device.current_device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def evaluate_and_print_results(
    prefix: str,
    forward_step_func: Callable[..., Any],
    held_out: HeldOut,
    model: list[nn.Module],
    iteration: int,
    consumed_samples: int,
    *,
    split: str = "validation",
    verbose: bool = False,
    deadline: float | None = None,
) -> tuple[dict[str, float], int] | None:
    """`evaluate`, print the result on the last rank and give it to the trackers.

    Args:
        prefix: the words after "validation loss at"; the name of `held_out` follows them.
        split: name of the data set in the trackers, before that of `held_out`.
    """
    timers = get_timers()
    timers("evaluate", log_level=0).start(barrier=True)
    result = evaluate(forward_step_func, held_out, model, verbose=verbose, deadline=deadline)
    timers("evaluate").stop()
    print_rank_last(timers.get_all_timers_string(["evaluate"]) or "") if verbose else None
    if result is None:
        return None
    losses = result[0]
    if parallel_state.is_pipeline_last_stage():
        text = f" validation loss at {_joined(prefix, held_out.name)} | "
        perplexities = perplexities_of(losses)
        for name, loss in losses.items():
            text += f"{name} value: {loss:.6E} | "
            text += f"{name} PPL: {perplexities[name]:.6E} | " if name in perplexities else ""
        rule = "-" * (len(text) + 1)
        print_rank_last(f"{rule}\n{text}\n{rule}")
    _track(losses, _joined(split, held_out.name), iteration, consumed_samples)
    return result


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def perplexity(loss: float) -> float:
    """exp(loss), with the loss cut at 20."""
    return math.exp(min(20.0, loss))


def perplexities_of(losses: dict[str, float]) -> dict[str, float]:
    """The perplexity of each that is a loss, and not an accuracy."""
    return {name: perplexity(loss) for name, loss in losses.items() if "loss" in name}


def _track(losses: dict[str, float], split: str, iteration: int, consumed_samples: int) -> None:
    trackers = get_trackers()
    if trackers is None:
        return
    trackers.log({f"{name} {split}": loss for name, loss in losses.items()}, iteration, consumed_samples)
    if get_args().log_validation_ppl_to_tensorboard:
        ppl = {f"{name} {split} ppl": value for name, value in perplexities_of(losses).items()}
        trackers.log(ppl, iteration, consumed_samples)
    trackers.record(
        {"iteration": iteration, "consumed_samples": consumed_samples}
        | {f"{name} {split}": loss for name, loss in losses.items()}
    )
