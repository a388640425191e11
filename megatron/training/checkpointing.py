"""Saving and resuming a training run.

Formats: `torch_dist`, which any layout can read, and `torch`, one file for each model-parallel rank. A
checkpoint appears all at once (`checkpoint_paths`), and a load compares it with the model before it changes
anything.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.collective import on_first_rank, together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch_files import read_catalog
from megatron.core.dist_checkpointing.validation import StrictHandling, parse_strict_flag
from megatron.training.checkpoint_checks import (
    plain_shape_mismatches,
    require_same_model,
    sharded_shape_mismatches,
)
from megatron.training.checkpoint_find import (
    Found,
    find_checkpoint,
    load_args_from_checkpoint,
    read_common,
    report_missing,
    require_known_format,
    saved_args,
)
from megatron.training.checkpoint_optimizer import (
    MODEL_SPACE,
    OptimizerRequest,
    full_precision_request,
    kind_of_optimizer,
    load_full_precision,
)
from megatron.training.checkpoint_paths import (
    begin_checkpoint,
    checkpoint_exists,
    discard_checkpoint,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    publish_checkpoint,
    read_metadata,
)
from megatron.training.checkpoint_state import (
    common_entries,
    load_model,
    restore_rng_state,
    restored_state,
    rng_object,
    sharded_model,
    sharded_rng_state,
)
from megatron.training.checkpoint_torch import (
    load_torch_optimizer,
    read_own,
    save_torch,
)
from megatron.training.train_state import TrainState
from megatron.training.utils import gather_weights, print_rank_0

__all__ = [
    "checkpoint_exists",
    "get_checkpoint_name",
    "get_checkpoint_tracker_filename",
    "load_args_from_checkpoint",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
]

DP_ZERO = "dp_zero_gather_scatter"


# ---- saving ----


def save_checkpoint(
    args: argparse.Namespace,
    state: TrainState,
    model: list[nn.Module],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
) -> Path:
    """Write a checkpoint into `args.save` and make it the latest; returns its directory. All ranks call this.

    If any rank fails, all raise `CheckpointingException`, what was written is removed, and the previous
    checkpoint stays the latest.
    """
    require_known_format(args.ckpt_format)
    gather_weights(model)
    print_rank_0(f"saving checkpoint at iteration {state.iteration:7d} to {args.save} in {args.ckpt_format} format")
    task = f"cannot save a checkpoint to {args.save}"
    folder = Path(args.save)
    directory = on_first_rank(task, lambda: begin_checkpoint(folder, state.iteration))
    try:
        if args.ckpt_format == "torch":
            save_torch(directory, args, state, model, optimizer, opt_param_scheduler)
        else:
            save_torch_dist(directory, args, state, model, optimizer, opt_param_scheduler)
        final = on_first_rank(task, lambda: publish_checkpoint(directory, state.iteration))
    except Exception:
        on_first_rank(task, lambda: discard_checkpoint(directory))
        raise
    print_rank_0(
        f"  successfully saved checkpoint from iteration {state.iteration:7d} to {args.save} {place_of_rank()}"
    )
    return final


def save_torch_dist(
    directory: Path,
    args: argparse.Namespace,
    state: TrainState,
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
) -> None:
    """Write a `torch_dist` checkpoint into an empty directory."""
    with together(f"cannot save to {directory}"):
        contents = common_entries(args, state, scheduler)
    metadata = content_metadata(args)
    model_state = sharded_model(model, metadata)
    contents.update(model_state)
    if optimizer is not None and not args.no_save_optim:
        contents["optimizer"] = optimizer.sharded_state_dict(model_state, metadata=metadata)
    if not args.no_save_rng:
        contents["rng_state"] = sharded_rng_state()
    strategy = get_default_save_sharded_strategy("torch_dist")
    if args.ckpt_fully_parallel_save:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    dist_checkpointing.save(
        contents,
        directory,
        strategy,
        preprocess_common_before_consistancy_check=comparable,
        content_metadata=metadata,
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


# ---- loading ----


def load_checkpoint(
    args: argparse.Namespace,
    model: list[nn.Module],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    load_arg: str = "load",
    strict: bool = True,
) -> TrainState:
    """Restore model, optimizer, schedule and random numbers; returns where the run stands. All ranks call
    this.

    A fresh `TrainState` is returned if there is no checkpoint, and if only weights are taken (`--finetune`,
    `--pretrained-checkpoint`, a release).

    Raises:
        CheckpointingException: on every rank, before the model is changed: the checkpoint is of another model
            (all differing settings, names and shapes are listed), damaged, or lacks what is to be loaded.
    """
    folder = getattr(args, load_arg)
    gather_weights(model)
    found = on_first_rank(f"cannot load from {folder}", lambda: find_checkpoint(args, load_arg))
    if found is None:
        if folder is not None:
            report_missing(args, folder)
        return TrainState()
    print_rank_0(f" loading {found}")
    common: dict[str, Any] = {}
    with together(f"cannot load {found.directory}"):
        common = read_common(found)
    load = load_torch if found.format == "torch" else load_torch_dist
    load(found, args, common, model, optimizer, opt_param_scheduler, strict)
    state = TrainState() if found.weights_only else restored_state(common)
    print_rank_0(
        f"  successfully loaded checkpoint from {found.folder} {place_of_rank()} at iteration {state.iteration}"
    )
    return state


@dataclass(frozen=True)
class Parts:
    """Which parts of a run's state are taken from a checkpoint."""

    optimizer: bool
    scheduler: bool
    rng: bool


def parts_to_load(
    found: Found, args: argparse.Namespace, saved: argparse.Namespace | None, optimizer: Any, scheduler: Any
) -> Parts:
    """What the flags ask for. The random state is left out where the layout has changed."""
    resuming = not found.weights_only
    with_optimizer = resuming and not args.no_load_optim
    same_layout = saved is None or layout_of(saved) == layout_of(args)
    rng = resuming and not args.no_load_rng and not getattr(saved, "no_save_rng", False)
    if rng and not same_layout:
        print_rank_0(
            f"(TP, PP) changed from {layout_of(saved)} to {layout_of(args)} in the checkpoint: "
            "the state of the random generators is ignored"
        )
    return Parts(
        optimizer=with_optimizer and optimizer is not None,
        scheduler=with_optimizer and scheduler is not None,
        rng=rng and same_layout,
    )


def layout_of(args: Any) -> tuple[int, int]:
    """Tensor and pipeline parallel sizes."""
    return getattr(args, "tensor_model_parallel_size", 1), getattr(args, "pipeline_model_parallel_size", 1)


def load_torch_dist(
    found: Found,
    args: argparse.Namespace,
    common: dict[str, Any],
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    strict: bool,
) -> None:
    """Restore from a `torch_dist` checkpoint of any layout."""
    saved = saved_args(common)
    parts = parts_to_load(found, args, saved, optimizer, scheduler)
    mode = parse_strict_flag(args.dist_ckpt_strictness)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    with together(f"cannot load {found.directory}"):
        require_entries(found, common, parts)
        sharding = sharding_type(args, saved, metadata, common["optimizer"]) if parts.optimizer else None
    model_request = sharded_model(model, metadata)
    with together(f"cannot load {found.directory}"):
        stored = read_catalog(found.directory)
        tolerant = mode is not StrictHandling.ASSUME_OK_UNEXPECTED or not strict
        mismatches = sharded_shape_mismatches(model_request, stored, only_shapes=tolerant)
    require_same_model(args, None if found.weights_only else saved, found.directory, found.format, mismatches)
    precise, request = full_precision_request(model_request, stored)
    conversion: OptimizerRequest | None = None
    if parts.optimizer:
        assert optimizer is not None
        request["optimizer"] = optimizer.sharded_state_dict(
            model_request, is_loading=True, metadata={**metadata, "distrib_optim_sharding_type": sharding}
        )
        if kind_of_optimizer(common["optimizer"]) != kind_of_optimizer(request["optimizer"]):
            conversion = OptimizerRequest(request["optimizer"], {*stored.tensors, *stored.objects})
            request["optimizer"] = conversion.request
    if parts.rng:
        request["rng_state"] = rng_object(None)
    if not strict and mode is StrictHandling.ASSUME_OK_UNEXPECTED:
        mode = StrictHandling.LOG_UNEXPECTED
    loaded = dist_checkpointing.load(request, found.directory, load_strategy(args, found), strict=mode)
    contents = loaded[0] if isinstance(loaded, tuple) else loaded
    merge(contents, load_full_precision(precise, found.directory))
    load_model(model, contents, strict=strict and mode is StrictHandling.ASSUME_OK_UNEXPECTED)
    if conversion is not None:
        contents["optimizer"] = conversion.finish(contents["optimizer"], found.directory)
    restore_rest(contents, parts, optimizer, scheduler)


def load_strategy(args: argparse.Namespace, found: Found) -> LoadShardedStrategy:
    """How tensors are read: by each rank for itself, or for the other data parallel ranks too."""
    strategy = get_default_load_sharded_strategy(found.directory)
    if not args.ckpt_fully_parallel_load:
        return strategy
    return FullyParallelLoadStrategyWrapper(
        strategy, parallel_state.get_data_parallel_group(with_context_parallel=True)
    )


def require_entries(found: Found, common: dict[str, Any], parts: Parts) -> None:
    """Raise if the checkpoint lacks parts that are to be loaded."""
    missing = [
        name
        for name, wanted in (("optimizer", parts.optimizer), ("opt_param_scheduler", parts.scheduler))
        if wanted and name not in common and not (name == "opt_param_scheduler" and "lr_scheduler" in common)
    ]
    if missing:
        raise CheckpointingException(
            f"{found.directory} has no {' and no '.join(missing)}: set --no-load-optim to start it "
            "afresh, or --finetune to take only the weights"
        )


def sharding_type(
    args: argparse.Namespace, saved: argparse.Namespace | None, metadata: dict[str, Any], state: Any
) -> str:
    """How a distributed optimizer's `state` was cut; raises if that cut does not fit this run."""
    if kind_of_optimizer(state) != "distributed":
        return MODEL_SPACE
    default = MODEL_SPACE if getattr(saved, "ckpt_fully_parallel_save", True) else DP_ZERO
    kind = metadata.get("distrib_optim_sharding_type", default)
    same = args.use_distributed_optimizer and (saved is None or layout_of(saved) == layout_of(args))
    if kind != MODEL_SPACE and not same:
        raise CheckpointingException(
            "the optimizer's state was saved with --no-ckpt-fully-parallel-save and fits only a distributed "
            f"optimizer with (TP, PP) = {layout_of(saved)}, this run has {layout_of(args)}: set --no-load-optim to "
            "start it afresh"
        )
    return kind


def load_torch(
    found: Found,
    args: argparse.Namespace,
    common: dict[str, Any],
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    strict: bool,
) -> None:
    """Restore from a `torch` checkpoint of the same layout."""
    saved = saved_args(common)
    parts = parts_to_load(found, args, saved, optimizer, scheduler)
    require_same_model(args, None if found.weights_only else saved, found.directory, found.format, [])
    contents: dict[str, Any] = {}
    mismatches: list[str] = []
    with together(f"cannot load {found.directory}"):
        contents = read_own(found.directory)
        require_entries(found, contents, parts)
        if parts.optimizer:
            require_same_kind_of_optimizer(args, saved)
        mismatches = plain_shape_mismatches(model, contents, strict)
    require_same_model(args, None, found.directory, found.format, mismatches)
    load_model(model, contents, strict)
    if parts.optimizer:
        load_torch_optimizer(found.directory, args, contents, optimizer)
    restore_rest(contents, parts, None if parts.optimizer else optimizer, scheduler)


def require_same_kind_of_optimizer(args: argparse.Namespace, saved: argparse.Namespace | None) -> None:
    """Raise if the files are those of a distributed optimizer and this run's is not, or the other way
    round."""
    was = getattr(saved, "use_distributed_optimizer", args.use_distributed_optimizer)
    if was != args.use_distributed_optimizer:
        raise CheckpointingException(
            f"the optimizer's state was saved with{'' if was else 'out'} --use-distributed-optimizer, which format "
            "torch cannot change: set the flag as it was, or --no-load-optim to start the optimizer afresh (a "
            "checkpoint of format torch_dist loads either way)"
        )


def restore_rest(contents: dict[str, Any], parts: Parts, optimizer: Any | None, scheduler: Any | None) -> None:
    """Restore optimizer, schedule and random numbers, after the model."""
    if parts.optimizer and optimizer is not None:
        optimizer.load_state_dict(contents["optimizer"])
    elif optimizer is not None:
        optimizer.reload_model_params()
    if parts.scheduler and scheduler is not None:
        scheduler.load_state_dict(contents.get("opt_param_scheduler", contents.get("lr_scheduler")))
    if parts.rng:
        if "rng_state" not in contents:
            raise CheckpointingException("the checkpoint has no rng_state: set --no-load-rng to start afresh")
        restore_rng_state(contents["rng_state"])
