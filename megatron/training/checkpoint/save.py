"""Saving a training run: collect, write, publish, and remove what is no longer kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.collective import on_first_rank, together
from megatron.core.dist_checkpointing.serialization import CONTENT_METADATA
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.training.checkpoint.context import CheckpointContext, Saved
from megatron.training.checkpoint.data import DATA_KEY, sharded_position
from megatron.training.checkpoint.extra_state import empty_extra_states
from megatron.training.checkpoint.find import require_known_format
from megatron.training.checkpoint.local import KINDS as LOCAL_KINDS
from megatron.training.checkpoint.local import local_root, save_local
from megatron.training.checkpoint.optimizer import MODEL_SPACE
from megatron.training.checkpoint.paths import (
    OWN_PLACE,
    Place,
    begin_checkpoint,
    discard_checkpoint,
    non_persistent_folder,
    publish_checkpoint,
)
from megatron.training.checkpoint.retention import remove_old_checkpoints
from megatron.training.checkpoint.state import common_entries, sharded_model, sharded_rng_state
from megatron.training.checkpoint.torch_format import save_torch
from megatron.training.train_state import TrainState
from megatron.training.utils import end_reading_of_weights, gather_weights, print_rank_0

DP_ZERO = "dp_zero_gather_scatter"


def save_run(
    args: argparse.Namespace,
    state: TrainState,
    model: list[nn.Module],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    context: CheckpointContext,
    *,
    non_persistent: bool = False,
    data_iterator: Any = None,
    comparable_common: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    place: Place = OWN_PLACE,
    on_saved: Saved = lambda directory: None,
) -> None:
    """Write a checkpoint into `args.save` and make it the latest. All ranks call this.

    With `--async-save` it returns as soon as the state is copied; `context.finish` publishes it. If any rank fails,
    all raise `CheckpointingException`, what was written is removed, and the previous checkpoint stays the latest.

    Args:
        non_persistent: save to the folder of checkpoints of which only the newest is kept.
        data_iterator: its position is saved too if it has one, see `checkpoint_data`.
        comparable_common: leaves out of the comparison between ranks what may differ.
        place: of this rank in the grid, if it is not that of its process groups; `torch` format only.
        on_saved: called on all ranks when the checkpoint is published.
    """
    require_known_format(args.ckpt_format)
    if place != OWN_PLACE and args.ckpt_format != "torch":
        raise ValueError(f"--ckpt-format {args.ckpt_format} has no files of a rank; only torch takes another place")
    context.finish(blocking=True)
    gather_weights(model)
    if non_persistent and args.non_persistent_ckpt_type in LOCAL_KINDS:
        metadata = content_metadata(args)
        contents = run_contents(args, state, model, optimizer, opt_param_scheduler, metadata, data_iterator)
        contents[CONTENT_METADATA] = metadata
        _save_local(args, contents, state.iteration, context, on_saved)
        end_reading_of_weights(model)
        return
    folder = non_persistent_folder(args, args.save) if non_persistent else Path(args.save)
    print_rank_0(f"saving checkpoint at iteration {state.iteration:7d} to {folder} in {args.ckpt_format} format")
    task = f"cannot save a checkpoint to {folder}"
    directory = on_first_rank(task, lambda: begin_checkpoint(folder, state.iteration))
    iteration = state.iteration

    def publish() -> None:
        final = on_first_rank(task, lambda: publish_checkpoint(directory, iteration))
        on_first_rank(task, lambda: remove_old_checkpoints(args, folder, iteration, non_persistent))
        print_rank_0(f"  successfully saved checkpoint from iteration {iteration:7d} to {folder} {place_of_rank()}")
        on_saved(final)

    try:
        if args.ckpt_format == "torch":
            save_torch(directory, args, state, model, optimizer, opt_param_scheduler, data_iterator, place)
        else:
            metadata = content_metadata(args)
            contents = run_contents(args, state, model, optimizer, opt_param_scheduler, metadata, data_iterator)
            request = save_sharded(directory, args, contents, metadata, context, comparable_common or comparable)
            if request is not None:
                request.add_finalize_fn(publish)
                context.schedule(request, directory)
                print_rank_0(f"  scheduled an async checkpoint save at iteration {iteration:7d} to {folder}")
                return
        publish()
    except Exception:
        on_first_rank(task, lambda: discard_checkpoint(directory))
        raise
    finally:
        end_reading_of_weights(model)


def _save_local(
    args: argparse.Namespace, contents: dict[str, Any], iteration: int, context: CheckpointContext, on_saved: Saved
) -> None:
    """Save to the nodes' own disks or memory; in the background with `--async-save`."""
    root = local_root(args)
    print_rank_0(f"saving local checkpoint at iteration {iteration:7d} to {root}")
    request = save_local(args, contents, iteration, context)

    def report() -> None:
        print_rank_0(f"  successfully saved local checkpoint from iteration {iteration:7d} to {root}")
        on_saved(root)

    if request is None:
        report()
        return
    request.add_finalize_fn(report)
    context.schedule(request, None)
    print_rank_0(f"  scheduled an async checkpoint save at iteration {iteration:7d} to {root}")


def run_contents(
    args: argparse.Namespace,
    state: TrainState,
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    metadata: dict[str, Any],
    data_iterator: Any = None,
) -> dict[str, Any]:
    """The sharded state dict of a run. All ranks call this."""
    contents: dict[str, Any] = {}
    with together("cannot collect the state to be saved"):
        contents = common_entries(args, state, scheduler)
    model_state = sharded_model(model, metadata)
    contents.update(model_state)
    contents["extra_states"] = empty_extra_states(model_state)
    if optimizer is not None and not args.no_save_optim:
        contents["optimizer"] = optimizer.sharded_state_dict(model_state, metadata=metadata)
    if not args.no_save_rng:
        contents["rng_state"] = sharded_rng_state()
    position = sharded_position(data_iterator)
    if position is not None:
        contents[DATA_KEY] = position
    return contents


def save_sharded(
    directory: Path,
    args: argparse.Namespace,
    contents: dict[str, Any],
    metadata: dict[str, Any],
    context: CheckpointContext,
    comparable_common: Callable[[dict[str, Any]], dict[str, Any]],
) -> AsyncRequest | None:
    """Write a checkpoint that fits every layout into an empty directory, or copy it, with `--async-save`."""
    in_background = bool(args.async_save)
    return dist_checkpointing.save(
        contents,
        directory,
        context.save_strategy(args),
        validate_access_integrity=context.needs_check(args, args.ckpt_format),
        async_sharded_save=in_background,
        preprocess_common_before_consistancy_check=comparable_common,
        content_metadata=metadata,
        background_saver=context.saver(args) if in_background else None,
    )


def content_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know to request the right state."""
    if not args.use_distributed_optimizer:
        return {}
    return {"distrib_optim_sharding_type": MODEL_SPACE if args.ckpt_fully_parallel_save else DP_ZERO}


def comparable(common: Any) -> Any:
    """What of the common state must be equal on all ranks: not the arguments, which name the rank, nor the
    order of parameter groups, which differs between pipeline stages and does not matter."""
    if not isinstance(common, dict):
        return common
    return {
        key: sorted(value, key=repr) if key == "param_groups" else comparable(value)
        for key, value in common.items()
        if key != "args"
    }


def place_of_rank() -> str:
    """This rank's place in the model-parallel grid, counted from 1."""
    ps = parallel_state
    return (
        f"[ t {ps.get_tensor_model_parallel_rank() + 1}/{ps.get_tensor_model_parallel_world_size()}, "
        f"p {ps.get_pipeline_model_parallel_rank() + 1}/{ps.get_pipeline_model_parallel_world_size()} ]"
    )
