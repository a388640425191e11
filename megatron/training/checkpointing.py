"""Saving and loading checkpoints: the names that programs call.

What they do stands in `checkpoint.save` and `checkpoint.load`. They take the settings from `get_args()` and the
counters of samples from `get_train_state()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.utils import unwrap_model
from megatron.training.checkpoint.body import Body, load_body
from megatron.training.checkpoint.context import CheckpointContext, context_in
from megatron.training.checkpoint.find import load_args_from_checkpoint
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.paths import (
    Place,
    checkpoint_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    read_metadata,
)
from megatron.training.checkpoint.save import save_run
from megatron.training.global_vars import get_args, get_train_state, set_train_state

__all__ = [
    "CheckpointContext",
    "checkpoint_exists",
    "get_checkpoint_name",
    "get_checkpoint_tracker_filename",
    "load_args_from_checkpoint",
    "load_biencoder_checkpoint",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
]


def save_checkpoint(
    iteration: int,
    model: list[nn.Module],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict[str, Any] | CheckpointContext | None = None,
    pipeline_rank: int | None = None,
    expert_rank: int | None = None,
    tensor_rank: int | None = None,
    pipeline_parallel: bool | None = None,
    expert_parallel: bool | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any = None,
    preprocess_common_state_dict_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Write a checkpoint into `--save` and make it the latest. All ranks call this.

    With `--async-save` the state is copied and written in the background; the next call, or
    `checkpointing_context`'s `close`, publishes it.

    Args:
        checkpointing_context: a dictionary that the caller keeps between calls; None shares one among all callers.
        pipeline_rank, expert_rank, tensor_rank, pipeline_parallel, expert_parallel: this rank's place, where it is not
            the one in the process groups (conversions in one process); `torch` format only.
        non_persistent_ckpt: save to the place of `--non-persistent-ckpt-type`.
        train_data_iterator: its position is saved too if it has a `state_dict`.
        preprocess_common_state_dict_fn: leaves out of the comparison between ranks what may differ.

    Raises:
        CheckpointingException: some rank failed, on all of them; the previous checkpoint stays the latest.
    """
    place = Place(tensor_rank, pipeline_rank, expert_rank, pipeline_parallel, expert_parallel)
    state = replace(
        get_train_state(),
        iteration=iteration,
        num_floating_point_operations_so_far=num_floating_point_operations_so_far,
    )
    save_run(
        get_args(),
        state,
        model,
        optimizer,
        opt_param_scheduler,
        context_in(checkpointing_context),
        non_persistent=non_persistent_ckpt,
        data_iterator=train_data_iterator,
        comparable_common=preprocess_common_state_dict_fn,
        place=place,
    )


def load_checkpoint(
    ddp_model: list[nn.Module],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    load_arg: str = "load",
    strict: bool = True,
    checkpointing_context: dict[str, Any] | CheckpointContext | None = None,
    skip_load_to_model_and_opt: bool = False,
) -> tuple[int, float]:
    """Restore model, optimizer, schedule, random numbers and counters from the newest whole checkpoint of `--load`. All
    ranks call this.

    Args:
        load_arg: name of the setting with the folder.
        strict: names that the model has and the checkpoint lacks are an error.
        skip_load_to_model_and_opt: read sharded tensors in place, but call no `load_state_dict`.

    Returns:
        (iteration, floating-point operations so far); both 0 if there is no checkpoint or only weights were taken.
    """
    context_in(checkpointing_context).finish(blocking=True)
    apply = not skip_load_to_model_and_opt
    state = load_run(get_args(), ddp_model, optimizer, opt_param_scheduler, load_arg, strict, apply)
    set_train_state(state)
    return state.iteration, state.num_floating_point_operations_so_far


def load_biencoder_checkpoint(
    model: list[nn.Module],
    only_query_model: bool = False,
    only_context_model: bool = False,
    custom_load_path: str | None = None,
) -> list[nn.Module]:
    """Take the weights of a retriever, of any layout; returns `model`. All ranks call this.

    Args:
        only_query_model, only_context_model: leave the other encoder as it is; no difference where one serves both.
        custom_load_path: the folder, in place of `--load`.

    Raises:
        CheckpointingException: there is no such checkpoint, or it is of another model or tokenizer.
    """
    args = get_args()
    folder = custom_load_path or args.load
    if not checkpoint_exists(folder):
        raise CheckpointingException(f"{folder} holds no checkpoint of a retriever")
    names = list(unwrap_model(model[0]).embedders)
    wanted = [name for name, left_out in zip(names, (only_context_model, only_query_model)) if not left_out]
    without = tuple(f"{name}." for name in names if name not in wanted) if len(names) > 1 else ()
    load_body(args.variant(load=folder, exit_on_missing_checkpoint=True), "load", [Body(model[0], without)])
    return model
