"""Does a checkpoint belong to the model that this run builds? Asked before anything of the model is
touched."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron.core.dist_checkpointing.collective import together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import split_for_saving
from megatron.core.dist_checkpointing.strategies.catalog import Catalog
from megatron.core.dist_checkpointing.strategies.reading import plan_load
from megatron.training.checkpoint.arguments import require_same_model as require_same_settings
from megatron.training.checkpoint.state import bare, model_keys
from megatron.training.settings import ConfigurationError

MOST_LINES = 40


def require_same_model(
    args: argparse.Namespace,
    saved: argparse.Namespace | None,
    directory: Path,
    on_disk: str,
    mismatches: Iterable[str],
) -> None:
    """Raise `CheckpointingException` on every rank unless the settings agree and there are no `mismatches`.

    Args:
        saved: arguments that the checkpoint was made with, if they are to be compared.
        on_disk: the checkpoint's format.
        mismatches: names and shapes of this rank's parameters that do not fit.
    """
    with together(f"cannot load {directory}"):
        lines = list(mismatches)
        if saved is not None:
            lines = [*setting_mismatches(args, saved, on_disk), *lines]
        if lines:
            listed = "\n  ".join(shorten(lines))
            raise CheckpointingException(f"the checkpoint is of another model or layout:\n  {listed}")


def setting_mismatches(args: argparse.Namespace, saved: argparse.Namespace, on_disk: str) -> list[str]:
    """Settings that must be those of the checkpoint and are not, as a line of a message."""
    try:
        require_same_settings(argparse.Namespace(**{**vars(args), "ckpt_format": on_disk}), saved)
    except ConfigurationError as error:
        return [str(error)]
    return []


def shorten(lines: list[str]) -> list[str]:
    """At most `MOST_LINES` lines, the last of which says how many are left out."""
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more"]


def sharded_shape_mismatches(model_state: dict[str, Any], stored: Catalog, only_shapes: bool) -> list[str]:
    """Parameters of this rank that a torch_dist checkpoint lacks or has in another shape.

    Args:
        model_state: result of `sharded_model`.
        stored: the checkpoint's table of contents.
        only_shapes: leave out the names that the checkpoint lacks, which the strictness mode decides about.
    """
    sharded, _ = split_for_saving(model_state)
    tensors: list[Any] = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    if only_shapes:
        tensors = [tensor for tensor in tensors if tensor.key in stored]
    try:
        plan_load(tensors, stored)
    except CheckpointingException as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def plain_shape_mismatches(model: list[nn.Module], state_dict: dict[str, Any], strict: bool) -> list[str]:
    """Parameters that the file of this rank lacks, has in excess, or has in another shape."""
    lines = []
    for key, chunk in zip(model_keys(model), model):
        saved = state_dict.get(key)
        if not isinstance(saved, dict):
            lines.append(f"{key}: not in the checkpoint, which has {', '.join(map(str, state_dict))}")
            continue
        own = {name: value for name, value in bare(chunk).state_dict().items() if isinstance(value, Tensor)}
        theirs = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
        if strict:
            lines += [f"{name}: not in the checkpoint" for name in own if name not in theirs]
            lines += [f"{name}: only in the checkpoint" for name in theirs if name not in own]
        lines += [
            f"{name}: shape {list(theirs[name].shape)} in the checkpoint, {list(value.shape)} expected"
            for name, value in own.items()
            if name in theirs and theirs[name].shape != value.shape
        ]
    return lines
