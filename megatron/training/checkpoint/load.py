"""Restoring a training run: find a whole checkpoint, compare it with the model, then read it into place."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.collective import on_first_rank, together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, load_into
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.scattered import ScatteredLoadStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling, parse_strict_flag
from megatron.core.export.legacy import is_legacy
from megatron.training.checkpoint.checks import (
    plain_shape_mismatches,
    require_same_model,
    sharded_shape_mismatches,
)
from megatron.training.checkpoint.data import DATA_KEY, position_object
from megatron.training.checkpoint.extra_state import leave_out_new_states
from megatron.training.checkpoint.find import (
    Found,
    candidates,
    find_checkpoint,
    hf_source,
    read_catalog_of,
    read_common,
    report_missing,
    saved_args,
)
from megatron.training.checkpoint.hf import load_hf
from megatron.training.checkpoint.local import KINDS as LOCAL_KINDS
from megatron.training.checkpoint.local import common_of_own_rank, local_iterations, local_root
from megatron.training.checkpoint.optimizer import (
    MODEL_SPACE,
    OptimizerRequest,
    full_precision_request,
    kind_of_optimizer,
    load_full_precision,
    needs_conversion,
    plain_names,
)
from megatron.training.checkpoint.save import DP_ZERO, content_metadata, place_of_rank
from megatron.training.checkpoint.state import (
    load_model,
    restore_rng_state,
    restored_state,
    rng_object,
    sharded_model,
)
from megatron.training.checkpoint.torch_format import load_torch_optimizer, read_own, read_position
from megatron.training.train_state import TrainState
from megatron.training.utils import gather_weights, print_rank_0


def load_run(
    args: argparse.Namespace,
    model: list[nn.Module],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    load_arg: str = "load",
    strict: bool = True,
    apply: bool = True,
) -> TrainState:
    """Restore model, optimizer, schedule and random numbers; returns where the run stands. All ranks call
    this.

    A fresh `TrainState` is returned if there is no checkpoint, and if only weights are taken (`--finetune`,
    `--pretrained-checkpoint`, a release).

    Args:
        load_arg: name of the setting with the folder.
        strict: names that the model has and the checkpoint lacks are an error.
        apply: hand what was read to the model and the optimizer; without, sharded tensors are still read in place.

    Raises:
        CheckpointingException: on every rank, before the model is changed: the checkpoint is of another model
            (all differing settings, names and shapes are listed), damaged, or lacks what is to be loaded.
    """
    folder = getattr(args, load_arg)
    gather_weights(model)
    if load_arg == "load" and args.non_persistent_ckpt_type in LOCAL_KINDS:
        restored = load_local(args, model, optimizer, opt_param_scheduler)
        if restored is not None:
            return restored
    found = find_checkpoint(args, load_arg)
    directory = hf_source(args, load_arg)
    if found is None and directory is not None:
        load_hf(args, directory, model, optimizer)
        return TrainState()
    if found is None:
        if folder is not None:
            report_missing(args, folder)
        return TrainState()
    print_rank_0(f" loading {found}")
    common: dict[str, Any] = {}
    with together(f"cannot load {found.directory}"):
        common = read_common(found)
    if found.format == "torch":
        position = load_torch(found, args, common, model, optimizer, opt_param_scheduler, strict)
    else:
        position = load_sharded(found, args, common, model, optimizer, opt_param_scheduler, strict, apply)
    state = TrainState() if found.weights_only else replace(restored_state(common), data_position=position)
    print_rank_0(
        f"  successfully loaded checkpoint from {found.folder} {place_of_rank()} at iteration {state.iteration}"
    )
    return state


def load_local(
    args: argparse.Namespace, model: list[nn.Module], optimizer: Any | None, scheduler: Any | None
) -> TrainState | None:
    """Restore from the newest checkpoint on the nodes of which nothing is lost, unless a persistent one is newer or was
    asked for; None if there is none. All ranks call this."""
    if args.finetune or args.ckpt_step is not None:
        return None
    persistent = on_first_rank(f"cannot load from {args.load}", lambda: candidates(args))
    if persistent and persistent[0].weights_only:
        return None
    iterations, seen = local_iterations(args)
    for iteration in iterations:
        if persistent and iteration < persistent[0].iteration:
            return None
        try:
            return _load_local(args, iteration, seen.get(iteration, {}), model, optimizer, scheduler)
        except CheckpointingException as error:
            print_rank_0(f"WARNING: skipping the local checkpoint of iteration {iteration}: {error}")
    return None


def _load_local(
    args: argparse.Namespace,
    iteration: int,
    seen: dict[int, Path],
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
) -> TrainState:
    root = local_root(args)
    print_rank_0(f" loading local checkpoint from {root} at iteration {iteration}")
    common = common_of_own_rank(seen)
    saved = saved_args(common)
    with together("cannot load the local checkpoint"):
        require_same_layout(args, saved)
    require_same_model(args, saved, root, "torch", [])
    parts = Parts(
        optimizer is not None and not args.no_load_optim and "optimizer" in common,
        scheduler is not None and not args.no_load_optim,
        not args.no_load_rng and not getattr(saved, "no_save_rng", False),
    )
    metadata = common.get("content_metadata") or content_metadata(args)
    request = sharded_model(model, metadata)
    if parts.optimizer:
        assert optimizer is not None
        request["optimizer"] = optimizer.sharded_state_dict(request, is_loading=True, metadata=metadata)
    if parts.rng:
        request["rng_state"] = rng_object(None)
    reader = ScatteredLoadStrategy(seen.values())
    contents, _, _ = load_into(
        common, request, root, reader, TorchCommonLoadStrategy(), validate_access_integrity=False
    )
    load_model(model, contents, strict=True)
    restore_rest(contents, parts, optimizer, scheduler)
    state = restored_state(common)
    print_rank_0(f"  successfully loaded local checkpoint from {root} at iteration {state.iteration}")
    return state


def require_same_layout(args: argparse.Namespace, saved: argparse.Namespace | None) -> None:
    """Raise unless the run is laid out as the one that wrote a local checkpoint."""
    names = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "use_distributed_optimizer")
    names += ("virtual_pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
    names += ("encoder_pipeline_model_parallel_size",)
    other = [
        f"{name} is {getattr(args, name, None)} here and {getattr(saved, name, None)} in the checkpoint"
        for name in names
        if getattr(args, name, None) != getattr(saved, name, None)
    ]
    if other:
        raise CheckpointingException("a local checkpoint fits its own layout only: " + "; ".join(other))


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


def layout_of(args: Any) -> tuple[int, ...]:
    """Tensor and pipeline parallel sizes, and the stages of an encoder where there are some."""
    encoder = getattr(args, "encoder_pipeline_model_parallel_size", 0)
    sizes = getattr(args, "tensor_model_parallel_size", 1), getattr(args, "pipeline_model_parallel_size", 1)
    return (*sizes, encoder) if encoder else sizes


def chunks_of(args: Any) -> tuple[Any, ...]:
    """What says which layers each rank's model chunks hold."""
    names = (
        "virtual_pipeline_model_parallel_size",
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    )
    return (*(getattr(args, name, None) for name in names), getattr(args, "pipeline_schedule", None) == "zb-v")


def load_sharded(
    found: Found,
    args: argparse.Namespace,
    common: dict[str, Any],
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    strict: bool,
    apply: bool,
) -> Any:
    """Restore from a checkpoint of any layout; returns the position of the data iterator, if there is one."""
    saved = saved_args(common)
    parts = parts_to_load(found, args, saved, optimizer, scheduler)
    mode = parse_strict_flag(args.dist_ckpt_strictness)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    with together(f"cannot load {found.directory}"):
        require_entries(found, common, parts)
        sharding = sharding_type(args, saved, metadata, common["optimizer"]) if parts.optimizer else None
    model_request = sharded_model(model, metadata)
    with together(f"cannot load {found.directory}"):
        stored = read_catalog_of(found.directory)
        leave_out_new_states(model_request, stored)
        tolerant = mode is not StrictHandling.ASSUME_OK_UNEXPECTED or not strict
        mismatches = sharded_shape_mismatches(model_request, stored, only_shapes=tolerant)
    require_same_model(args, None if found.weights_only else saved, found.directory, found.format, mismatches)
    names = plain_names((*stored.tensors, *stored.objects))
    precise, request = full_precision_request(model_request, stored, names)
    conversion: OptimizerRequest | None = None
    if parts.optimizer:
        assert optimizer is not None
        request["optimizer"] = optimizer.sharded_state_dict(
            model_request, is_loading=True, metadata={**metadata, "distrib_optim_sharding_type": sharding}
        )
        if needs_conversion(common["optimizer"], request["optimizer"]):
            conversion = OptimizerRequest(request["optimizer"], common["optimizer"], names)
            request["optimizer"] = conversion.request
    if parts.rng:
        request["rng_state"] = rng_object(None)
    position = position_object(None)
    if not found.weights_only and position.unique_key in stored:
        request[DATA_KEY] = position
    if not strict and mode is StrictHandling.ASSUME_OK_UNEXPECTED:
        mode = StrictHandling.LOG_UNEXPECTED
    loaded = dist_checkpointing.load(request, found.directory, load_strategy(args, found), strict=mode)
    contents = loaded[0] if isinstance(loaded, tuple) else loaded
    merge(contents, load_full_precision(precise, found.directory))
    if not apply:
        return contents.get(DATA_KEY)
    load_model(model, contents, strict=strict and mode is StrictHandling.ASSUME_OK_UNEXPECTED)
    if conversion is not None:
        contents["optimizer"] = conversion.finish(contents["optimizer"], found.directory)
    restore_rest(contents, parts, optimizer, scheduler)
    return contents.get(DATA_KEY)


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


def _buffers_of(args: Any) -> tuple[Any, ...]:
    """What decides which weights share a buffer."""
    experts = getattr(args, "expert_model_parallel_size", 1), getattr(args, "expert_tensor_parallel_size", None)
    return layout_of(args), chunks_of(args), experts if getattr(args, "num_experts", None) else None


def sharding_type(
    args: argparse.Namespace, saved: argparse.Namespace | None, metadata: dict[str, Any], state: Any
) -> str:
    """How a distributed optimizer's `state` was cut; raises if that cut does not fit this run."""
    if kind_of_optimizer(state) != "distributed":
        return MODEL_SPACE
    default = MODEL_SPACE if getattr(saved, "ckpt_fully_parallel_save", True) else DP_ZERO
    kind = metadata.get("distrib_optim_sharding_type", default)
    same = args.use_distributed_optimizer and (saved is None or _buffers_of(saved) == _buffers_of(args))
    if kind != MODEL_SPACE and not same:
        raise CheckpointingException(
            "the optimizer's state was saved with --no-ckpt-fully-parallel-save and fits only a distributed "
            f"optimizer with (TP, PP) = {layout_of(saved)}, the same model chunks and the same layout of experts, this "
            f"run has {layout_of(args)}: set --no-load-optim to start it afresh"
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
) -> Any:
    """Restore from a `torch` checkpoint of the same layout; returns the position of the data iterator, if there is
    one."""
    saved = saved_args(common)
    parts = parts_to_load(found, args, saved, optimizer, scheduler)
    require_same_model(args, None if found.weights_only else saved, found.directory, found.format, [])
    contents: dict[str, Any] = {}
    mismatches: list[str] = []
    with together(f"cannot load {found.directory}"):
        contents = read_own(found.directory)
        if is_legacy(contents.get("model") or {}):
            raise CheckpointingException(
                "it is of Megatron-LM's older classes: convert its weights first (tools/checkpoint/convert.py --loader "
                "legacy --saver core)"
            )
        require_entries(found, contents, parts)
        if parts.optimizer:
            require_same_kind_of_optimizer(args, saved)
        mismatches = plain_shape_mismatches(model, contents, strict)
    require_same_model(args, None, found.directory, found.format, mismatches)
    load_model(model, contents, strict)
    if parts.optimizer:
        load_torch_optimizer(found.directory, args, contents, optimizer)
    restore_rest(contents, parts, None if parts.optimizer else optimizer, scheduler)
    return None if found.weights_only else read_position(found.directory)


def require_same_kind_of_optimizer(args: argparse.Namespace, saved: argparse.Namespace | None) -> None:
    """Raise if the files are those of a distributed optimizer, or of one with weights in fp8 (in buffers of their own),
    and this run's is not, or the other way round."""
    for name in ("use_distributed_optimizer", "fp8_param_gather"):
        here = getattr(args, name, False)
        was = getattr(saved, name, here)
        if was != here:
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointingException(
                f"the optimizer's state was saved with{'' if was else 'out'} {flag}, which format "
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
