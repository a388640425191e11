"""What the training loop does besides training: each habit is one action, listed once from the flags, in order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron.core import device
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import check_param_hashes_across_dp_replicas
from megatron.training.checkpoint.save import save_run
from megatron.training.device_memory import write_memory_history
from megatron.training.evaluation import evaluate_and_print_results
from megatron.training.global_vars import get_signal_handler, get_timers, get_trackers
from megatron.training.initialize import print_datetime
from megatron.training.logging.training_log import training_log
from megatron.training.run import Action, Run, StopTraining
from megatron.training.train_step import StepResult
from megatron.training.utils import gather_weights, is_last_rank, print_rank_0


def periodic_actions(run: Run, of_program: Sequence[Action] = ()) -> list[Action]:
    """The actions after each iteration, in the order in which they run; those of the program before what may end it."""
    args = run.args
    listed: list[tuple[bool, Action]] = [
        (True, training_log),
        (args.record_memory_history, write_memory_snapshot),
        (bool(args.eval_interval and run.validation_sets), evaluate_now),
        *((True, action) for action in of_program),
        (bool(args.train_sync_interval), synchronize_device),
        (bool(args.check_weight_hash_across_dp_replicas_interval), compare_weights_of_replicas),
        (bool(args.manual_gc and args.manual_gc_interval), collect_garbage),
        (bool(args.async_save), finish_saves),
        (args.exit_signal_handler, stop_on_signal),
        (bool(args.save and args.save_interval), save_now),
        (bool(args.exit_duration_in_mins), stop_after_minutes),
        (bool(args.exit_interval), stop_at_interval),
    ]
    return [action for is_on, action in listed if is_on]


def write_memory_snapshot(run: Run, result: StepResult) -> None:
    """The last rank's device memory, at each log."""
    if run.state.iteration % run.args.log_interval == 0 and is_last_rank():
        write_memory_history(run.args.memory_snapshot_path)


def evaluate_now(run: Run, result: StepResult) -> None:
    """Validate every `--eval-interval` iterations."""
    args = run.args
    if run.state.iteration % args.eval_interval:
        return
    timers = get_timers()
    run.progress.clear()
    with interval_paused(run):
        if args.manual_gc and args.manual_gc_eval:
            gc.collect()
        timers("eval-time", log_level=0).start(barrier=True)
        for held_out in run.validation_sets:
            seen = evaluate_and_print_results(
                f"iteration {run.state.iteration}" + (" on" if held_out.name else ""),
                run.forward_step_func,
                held_out,
                run.model,
                run.state.iteration,
                run.state.consumed_train_samples,
                deadline=run.started + args.exit_duration_in_mins * 60 if args.exit_duration_in_mins else None,
            )
            if seen is None:
                break
            if held_out is run.validation_sets[-1] and not args.full_validation:  # all stand at the same place
                run.state.consumed_valid_samples += seen[1]
        timers("eval-time").stop()
        if args.manual_gc and args.manual_gc_eval:
            gc.collect(generation=0)


def synchronize_device(run: Run, result: StepResult) -> None:
    """Wait for the device every `--train-sync-interval` iterations."""
    if run.state.iteration % run.args.train_sync_interval == 0:
        device.synchronize()


def compare_weights_of_replicas(run: Run, result: StepResult) -> None:
    """Make sure that data parallel replicas hold the same bits."""
    if run.state.iteration % run.args.check_weight_hash_across_dp_replicas_interval:
        return
    gather_weights(run.model, widen=False)  # those in fp8 as they are: widened, they are the same anyway
    if not check_param_hashes_across_dp_replicas(run.model, cross_check=True):
        raise RuntimeError(f"the weights of data parallel replicas differ after iteration {run.state.iteration}")
    print_rank_0(f">>> Weight hashes match after {run.state.iteration} iterations...")


def collect_garbage(run: Run, result: StepResult) -> None:
    """Collect garbage every `--manual-gc-interval` iterations, on all ranks at once."""
    if run.state.iteration % run.args.manual_gc_interval == 0:
        gc.collect()


def finish_saves(run: Run, result: StepResult) -> None:
    """Publish the checkpoint that is being written in the background once all ranks have written it."""
    run.checkpoints.finish()


def save_now(run: Run, result: StepResult) -> None:
    """Save every `--save-interval` iterations, and in between for a short while every
    `--non-persistent-save-interval`."""
    args, iteration = run.args, run.state.iteration
    if iteration % args.save_interval == 0:
        save(run)
    elif args.non_persistent_save_interval and iteration % args.non_persistent_save_interval == 0:
        save(run, non_persistent=True)


def stop_on_signal(run: Run, result: StepResult) -> None:
    """Save and stop when SIGTERM has arrived on any rank."""
    if get_signal_handler().received_anywhere():
        save(run)
        raise StopTraining("exiting program after receiving SIGTERM.")


def stop_after_minutes(run: Run, result: StepResult) -> None:
    """Save and stop when `--exit-duration-in-mins` have passed on any rank."""
    is_late = run.minutes() > run.args.exit_duration_in_mins
    late = torch.tensor(is_late, dtype=torch.int32, device=device.current_device())
    torch.distributed.all_reduce(late, torch.distributed.ReduceOp.MAX)
    if late.item():
        save(run)
        raise StopTraining(f"exiting program after {run.minutes()} minutes")


def stop_at_interval(run: Run, result: StepResult) -> None:
    """Save and stop at a multiple of `--exit-interval` iterations."""
    if run.state.iteration % run.args.exit_interval == 0:
        save(run)
        raise StopTraining(f"exiting program at iteration {run.state.iteration}")


def save(run: Run, *, non_persistent: bool = False) -> None:
    """Save a checkpoint unless this iteration is saved already, or nothing is to be saved."""
    args = run.args
    if not args.save or run.saved_iteration == run.state.iteration:
        return
    timers = get_timers()
    run.progress.clear()
    name = "save-checkpoint-non-persistent" if non_persistent else "save-checkpoint"
    if args.async_save and not non_persistent:
        log_progress(run, "Saving async checkpoint")
    with interval_paused(run):
        timers(name, log_level=0).start(barrier=True)
        save_run(
            args,
            run.state,
            run.model,
            run.optimizer,
            run.scheduler,
            run.checkpoints,
            non_persistent=non_persistent,
            data_iterator=run.train_data,
            on_saved=_note_published(run, run.state.iteration, non_persistent),
        )
        if not non_persistent:
            run.saved_iteration = run.state.iteration
        timers(name).stop()
    report = timers.log([name])
    if report:
        print(report, flush=True)
    trackers = get_trackers()
    if trackers is not None:
        trackers.flush()


def _note_published(run: Run, iteration: int, non_persistent: bool) -> Callable[[Path], None]:
    """What to do when a checkpoint is on the disk, perhaps some iterations later."""

    def note(directory: Path) -> None:
        if non_persistent:
            return
        if run.args.async_save:
            log_finished(run, iteration)
        else:
            log_progress(run, "Saved checkpoint")

    return note


@contextmanager
def interval_paused(run: Run) -> Iterator[None]:
    """Keep what happens inside out of the time and the energy per iteration."""
    timer = get_timers()("interval-time", log_level=0)
    running = getattr(timer, "running", False)
    if running:
        timer.stop()
    if run.energy is not None:
        run.energy.pause()
    yield
    if run.energy is not None:
        run.energy.resume()
    if running:
        timer.start(barrier=True)


def log_progress(run: Run, event: str) -> None:
    """Append a line about a saved checkpoint to progress.txt, with `--log-progress`."""
    if run.args.log_progress and run.args.save and torch.distributed.get_rank() == 0:
        from megatron.training.logging.progress_file import append_saved

        append_saved(run, event)


def log_finished(run: Run, iteration: int) -> None:
    """Append a line about a checkpoint that was written in the background, with `--log-progress`."""
    if run.args.log_progress and torch.distributed.get_rank() == 0:
        from megatron.training.logging.progress_file import append_finished

        append_finished(run.args, iteration)


def grown_batch(run: Run, before: int) -> None:
    """The batch size has grown: save, so that a resumed run starts at the border."""
    if before != get_num_microbatches() and run.state.iteration:
        print_datetime(f"batch size ramp-up: {before} -> {get_num_microbatches()} microbatches")
        save(run)
