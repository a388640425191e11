"""Gathers the numbers of an iteration for the log line, the trackers and the progress line."""

from __future__ import annotations

from typing import Any

from megatron.core import device, parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.flops import num_floating_point_operations
from megatron.training.global_vars import get_timers, get_trackers
from megatron.training.logging.log_line import LogLine
from megatron.training.run import Run
from megatron.training.theoretical_memory_usage import report_theoretical_memory
from megatron.training.train_step import StepResult
from megatron.training.utils import calc_params_l2_norm, is_last_rank, print_rank_0, rank

_P2P = [
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
]
TIMERS = [
    "forward-backward",
    "forward-compute",
    "backward-compute",
    "batch-generator",
    *_P2P,
    "layernorm-grads-all-reduce",
    "embedding-grads-all-reduce",
    "all-grads-sync",
    "params-all-gather",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "optimizer",
]


def training_log(run: Run, result: StepResult) -> None:
    """Report an iteration: totals always, trackers and the log line at their intervals."""
    args, state = run.args, run.state
    run.totals.add(result.losses, result.skipped)
    if is_last_rank():
        run.progress.show(state.iteration, result.losses, run.batch_size * args.seq_length)
    is_log_time = state.iteration % args.log_interval == 0
    params_norm = None
    if args.log_params_norm and (is_log_time or state.iteration % args.tensorboard_log_interval == 0):
        params_norm = calc_params_l2_norm(run.model)
    learning_rate = largest_learning_rate(run.optimizer)
    if state.iteration % args.tensorboard_log_interval == 0:
        _track(run, result, learning_rate, params_norm)
    if is_log_time:
        _print_line(run, result, learning_rate, params_norm)


def largest_learning_rate(optimizer: Any) -> float:
    """Learning rate that the next iteration uses, of the groups that are not decoupled."""
    rates = [g["lr"] for g in optimizer.param_groups if not g.get("is_decoupled_lr", False)]
    return float(max(rates)) if rates else 0.0


def decoupled_learning_rate(optimizer: Any) -> float | None:
    """Learning rate of embedding and output layer, if they have one of their own."""
    rates = [g["lr"] for g in optimizer.param_groups if g.get("is_decoupled_lr", False)]
    return float(max(rates)) if rates else None


def _track(run: Run, result: StepResult, learning_rate: float, params_norm: float | None) -> None:
    trackers = get_trackers()
    args, state = run.args, run.state
    if args.log_timers_to_tensorboard:
        writer = trackers.tensorboard if trackers else None
        get_timers().write(TIMERS, writer, state.iteration, normalizer=args.log_interval)
    if trackers is None:
        return
    values: dict[str, float] = {"learning-rate": learning_rate, "batch-size": run.batch_size, **result.losses}
    decoupled = decoupled_learning_rate(run.optimizer)
    if decoupled is not None:
        values["decoupled-learning-rate"] = decoupled
    if state.skipped_train_samples:
        values["skipped-train-samples"] = state.skipped_train_samples
    if args.log_loss_scale_to_tensorboard:
        values["loss-scale"] = loss_scale(run.optimizer)
    if args.log_world_size_to_tensorboard:
        values["world-size"] = args.world_size
    optional = {"grad-norm": result.grad_norm, "num-zeros": result.num_zeros, "params-norm": params_norm}
    values |= {name: value for name, value in optional.items() if value is not None}
    trackers.log(values, state.iteration, state.consumed_train_samples)
    if args.log_memory_to_tensorboard:
        stats = device.memory_stats()
        named = {"mem-reserved-bytes": "reserved", "mem-allocated-bytes": "allocated"}
        named["mem-max-allocated-bytes"] = "max_allocated"
        trackers.log({name: stats[key] for name, key in named.items()}, state.iteration)
    counters = {"iteration": state.iteration, "consumed_samples": state.consumed_train_samples}
    trackers.record({**counters, "skipped": result.skipped, **values})


def loss_scale(optimizer: Any) -> float:
    """The present loss scale, 1 without one."""
    return float(optimizer.get_loss_scale().item())


def _print_line(run: Run, result: StepResult, learning_rate: float, params_norm: float | None) -> None:
    args, state, timers, totals = run.args, run.state, get_timers(), run.totals
    elapsed = timers("interval-time").elapsed(barrier=True) / max(1, totals.iterations)
    tflops = num_floating_point_operations(args, run.batch_size) / (elapsed * 1e12 * args.world_size)
    line = LogLine(
        iteration=state.iteration,
        train_iters=args.train_iters,
        consumed_samples=state.consumed_train_samples,
        skipped_samples=state.skipped_train_samples,
        milliseconds=elapsed * 1000,
        tflops=tflops if args.log_throughput else None,
        joules=None if run.energy is None else run.energy.lap() / max(1, totals.iterations),
        learning_rate=learning_rate,
        decoupled_learning_rate=decoupled_learning_rate(run.optimizer),
        global_batch_size=run.batch_size,
        losses=totals.averages(),
        loss_scale=loss_scale(run.optimizer),
        grad_norm=result.grad_norm,
        num_zeros=result.num_zeros,
        params_norm=params_norm,
        skipped_iterations=totals.skipped,
        nan_iterations=totals.nan,
    )
    trackers = get_trackers()
    if trackers is not None and args.log_timers_to_tensorboard:
        timing = {"iteration-time": elapsed} | ({"throughput": tflops} if args.log_throughput else {})
        trackers.log(timing, state.iteration)
    if is_last_rank():
        run.progress.clear()
        print(str(line), flush=True)
    if not run.has_reported_memory:
        run.has_reported_memory = True
        print_rank_0(report_theoretical_memory(args, get_num_microbatches()))
        _report_memory(state.iteration)
    report = timers.log(TIMERS, normalizer=args.log_interval)
    if report:
        print(report, flush=True)
    run.totals = type(totals)()


def _report_memory(iteration: int) -> None:
    """One line of each rank with data parallel rank 0."""
    if parallel_state.get_data_parallel_rank() == 0:
        stats = {name.replace("_", " "): value / 2**20 for name, value in device.memory_stats().items()}
        shown = " | ".join(f"{name}: {value}" for name, value in stats.items())
        print(f"[Rank {rank()}] (after {iteration} iterations) memory (MB) | {shown}", flush=True)
