"""`pretrain`: from a command line to a trained model."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches, update_num_microbatches
from megatron.core.utils import get_model_config
from megatron.training.checkpoint.convert_format import convert_format
from megatron.training.checkpoint.data import restore_position
from megatron.training.checkpoint.hf import save_hf
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.upcycling import load_upcycled
from megatron.training.device_memory import start_memory_history
from megatron.training.errors import exit_at_once_on_error
from megatron.training.evaluation import evaluate_and_print_results
from megatron.training.flops import num_floating_point_operations
from megatron.training.global_vars import get_args, get_timers, get_tokenizer, set_train_state
from megatron.training.initialize import close_program, initialize_megatron, print_datetime, program_start
from megatron.training.logging.energy import EnergyMeter
from megatron.training.logging.progress import ProgressLine
from megatron.training.logging.progress_file import append_start
from megatron.training.nan_check import FiniteCheck
from megatron.training.periodic import grown_batch, periodic_actions, save
from megatron.training.profiling import Profiler
from megatron.training.run import Action, Run, StopTraining
from megatron.training.setup import (
    DatasetProvider,
    build_train_valid_test_data_iterators,
    build_train_valid_test_datasets,
    get_model,
    get_train_valid_test_num_samples,
    setup_model_and_optimizer,
)
from megatron.training.timeline.recorder import Timeline
from megatron.training.train_state import TrainState
from megatron.training.train_step import forget_further_losses, train_step
from megatron.training.utils import print_rank_0, rank

__all__ = [
    "build_train_valid_test_datasets",
    "get_model",
    "get_train_valid_test_num_samples",
    "pretrain",
    "setup_model_and_optimizer",
    "train",
    "train_step",
]


def load_if_asked(args: Any, model: list[Any], optimizer: Any, scheduler: Any) -> TrainState:
    """What `--load` or `--pretrained-checkpoint` hold; a fresh run without them."""
    if not (args.load or args.pretrained_checkpoint):
        return TrainState()
    if args.moe_use_upcycling:
        return load_upcycled(args, model, optimizer)
    return load_run(args, model, optimizer, scheduler)


def pretrain(
    train_valid_test_dataset_provider: DatasetProvider,
    model_provider: Callable[..., Any],
    model_type: ModelType,
    forward_step_func: Callable[..., Any],
    process_non_loss_data_func: Callable[..., Any] | None = None,
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
    get_embedding_ranks: Callable[..., list[int]] | None = None,
    get_position_embedding_ranks: Callable[..., list[int]] | None = None,
    non_loss_data_func: Callable[..., Any] | None = None,
    store: Any = None,
    inprocess_call_wrapper: Any = None,
    *,
    load: Callable[..., TrainState] = load_if_asked,
    more_actions: Callable[[], Sequence[Action]] = list,
) -> None:
    """Train the model of a program on its data, as the command line says.

    Args:
        train_valid_test_dataset_provider: ([train, valid, test] sample counts) -> three data sets; with an attribute
            `is_distributed` true it is called on every rank, else on the first of each tensor parallel group.
        model_provider: (pre_process, post_process) -> this stage's model, not yet cast or wrapped.
        forward_step_func: (data iterator, model) -> (output tensor, loss function), see `get_forward_backward_func`.
        extra_args_provider: (parser) -> parser with the program's own flags.
        args_defaults: values for flags that the user did not set.
        load: see `set_up`.
        more_actions: called once the flags are known, gives what else is done after each iteration.

    An error on one rank is printed there and ends that process at once, so that the others do not wait for it.
    """
    for name, value in (
        ("process_non_loss_data_func", process_non_loss_data_func),
        ("non_loss_data_func", non_loss_data_func),
        ("inprocess_call_wrapper", inprocess_call_wrapper),
    ):
        if value is not None:
            raise NotImplementedError(f"pretrain({name}=...) is not built yet; leave it out")
    with exit_at_once_on_error():
        initialize_megatron(
            extra_args_provider,
            args_defaults,
            get_embedding_ranks=get_embedding_ranks,
            get_position_embedding_ranks=get_position_embedding_ranks,
            store=store,
            for_training=True,
        )
        actions = more_actions()
        run = set_up(train_valid_test_dataset_provider, model_provider, model_type, forward_step_func, load)
        if run.args.skip_train:
            print_rank_0("skipping training (--skip-train is on) ...")
        else:
            train_to_the_end(run, actions)
        _export(run)
        _evaluate_at_the_end(run)
        close(run)


def set_up(
    provider: DatasetProvider,
    model_provider: Callable[..., Any],
    model_type: ModelType,
    forward_step_func: Callable[..., Any],
    load: Callable[..., TrainState] = load_if_asked,
) -> Run:
    """Everything that training needs, from initialised settings and process groups; see `pretrain`.

    Args:
        load: (args, model, optimizer, schedule) -> where the run stands, after restoring them.
    """
    args, timers = get_args(), get_timers()
    if args.record_memory_history:
        start_memory_history()
    started = program_start()
    print_rank_0(f"time to initialize megatron (seconds): {time.time() - started:.3f}")
    print_datetime("after megatron is initialized")
    if args.log_progress and args.save and rank() == 0:
        append_start(args)
    forget_further_losses()
    timers("model-and-optimizer-setup", log_level=0).start(barrier=True)
    model, optimizer, scheduler = setup_model_and_optimizer(model_provider, model_type)
    timers("model-and-optimizer-setup").stop()
    timers("load-checkpoint", log_level=0).start(barrier=True)
    state = load(args, model, optimizer, scheduler)
    timers("load-checkpoint").stop(barrier=True)
    set_train_state(state)
    if args.ckpt_convert_format:
        convert_format(args, state, model, optimizer, scheduler)
        close_program()
        sys.exit(0)
    update_num_microbatches(state.consumed_train_samples, consistency_check=False)
    print_datetime("after model, optimizer, and learning rate scheduler are built")
    timers("train/valid/test-data-iterators-setup", log_level=0).start(barrier=True)
    train_data, validation_sets, test_sets = build_train_valid_test_data_iterators(provider, state)
    restore_position(train_data, state.data_position)
    state.data_position = None
    timers("train/valid/test-data-iterators-setup").stop()
    print_datetime("after dataloaders are built")
    print_rank_0("done with setup ...")
    report = timers.log(
        ["model-and-optimizer-setup", "load-checkpoint", "train/valid/test-data-iterators-setup"], barrier=True
    )
    if report:
        print(report, flush=True)
    return Run(
        args,
        state,
        model,
        optimizer,
        scheduler,
        get_model_config(model[0]),
        forward_step_func,
        train_data,
        validation_sets,
        test_sets,
        started=started,
        first_iteration=state.iteration,
        saved_iteration=state.iteration if args.load == args.save and state.iteration else None,
        progress=ProgressLine(args.progress_bar, args.train_iters),
        flops_at_start=state.num_floating_point_operations_so_far,
        energy=EnergyMeter() if args.log_energy else None,
    )


def train_to_the_end(run: Run, more_actions: Sequence[Action] = ()) -> None:
    """Train and save; a run that is asked to stop before ends the program."""
    print_rank_0("training ...")
    try:
        train(run, more_actions)
    except StopTraining as stop:
        print_datetime(str(stop))
        _export(run)
        close(run)
        sys.exit(0)
    print_datetime("after training is done")
    if run.state.iteration > run.first_iteration:
        save(run)


def _export(run: Run) -> None:
    """Write the model for transformers, if that is asked for."""
    if run.args.save_hf:
        save_hf(run.args, run.model, get_tokenizer())


def train(run: Run, more_actions: Sequence[Action] = ()) -> None:
    """The loop: iterate until `--train-iters`, doing the listed actions (and `more_actions`) after each iteration."""
    args, state = run.args, run.state
    for chunk in run.model:
        chunk.train()
    actions = periodic_actions(run, more_actions)
    run.checkpoints.prepare(args, run.model, run.optimizer)
    finite, timeline = _finite_check(run), Timeline(args.timeline, args.timeline_step)
    if args.manual_gc:
        gc.disable()
        gc.collect()
    get_timers()("interval-time", log_level=0).start(barrier=True)
    if run.energy is not None:
        run.energy.lap()  # what setting up has used
    print_datetime("before the start of training step")
    with Profiler(args) as profiler:
        while state.iteration < args.train_iters:
            profiler.step(state.iteration)
            _update_batch_size(run)
            if state.iteration + 1 in args.iterations_to_skip:
                _skip_iteration(run)
                continue
            if finite is not None:
                finite.iteration = state.iteration + 1
            with timeline.recording(state.iteration + 1, run.model, run.config):
                result = train_step(
                    run.forward_step_func, run.train_data, run.model, run.optimizer, run.scheduler, run.config, finite
                )
            state.iteration += 1
            state.consumed_train_samples += run.batch_size
            state.num_floating_point_operations_so_far += num_floating_point_operations(args, run.batch_size)
            for action in actions:
                action(run, result)
    run.progress.clear()
    get_timers()("interval-time").stop()


def _finite_check(run: Run) -> FiniteCheck | None:
    args = run.args
    if not (args.check_for_nan_in_loss_and_grad or args.check_for_spiky_loss):
        return None
    check = FiniteCheck(rank(), args.check_for_nan_in_loss_and_grad, args.check_for_spiky_loss)
    for chunk in run.model:
        chunk.report_bad_gradients_to(check.complain)  # type: ignore[operator]
    return check


def _update_batch_size(run: Run) -> None:
    before = get_num_microbatches()
    update_num_microbatches(run.state.consumed_train_samples, consistency_check=False)
    grown_batch(run, before)
    update_num_microbatches(run.state.consumed_train_samples, consistency_check=True, verbose=True)


def _skip_iteration(run: Run) -> None:
    """Read and drop the data of an iteration listed in `--iterations-to-skip`."""
    for _ in range(get_num_microbatches()):
        for iterator in run.train_data if isinstance(run.train_data, list) else [run.train_data]:
            if iterator is not None:
                next(iterator)
    run.state.iteration += 1
    run.state.consumed_train_samples += run.batch_size
    run.state.skipped_train_samples += run.batch_size


def _evaluate_at_the_end(run: Run) -> None:
    for split, sets in (("validation", run.validation_sets), ("test", run.test_sets)):
        for held_out in sets:
            evaluate_and_print_results(
                f"iteration {run.state.iteration} on {split} set",
                run.forward_step_func,
                held_out,
                run.model,
                run.state.iteration,
                run.state.consumed_train_samples,
                split=split,
                verbose=True,
            )


def close(run: Run) -> None:
    """Finish saves and trackers, and leave the process groups."""
    run.checkpoints.close()
    close_program()
