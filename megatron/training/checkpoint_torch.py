"""The `torch` format: one file for each model-parallel rank, which only the same layout can read.

`mp_rank_<tensor>[_<pipeline>]/model_optim_rng.pt` holds everything, except that the sharded state of a
distributed optimizer lies beside it in `distrib_optim.pt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.collective import together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from megatron.core.dist_checkpointing.strategies.torch_files import save_torch_file
from megatron.training.checkpoint_paths import (
    DISTRIB_OPTIM_FNAME,
    MODEL_FNAME,
    find_first_rank_file,
    rank_directory_name,
    sync_tree,
)
from megatron.training.checkpoint_state import common_entries, plain_model, rng_states_of_replicas
from megatron.training.train_state import TrainState


def own_directory(directory: Path) -> Path:
    """Where this model-parallel rank's files lie in a checkpoint."""
    ps = parallel_state
    pipeline = ps.get_pipeline_model_parallel_rank() if ps.get_pipeline_model_parallel_world_size() > 1 else None
    expert = ps.get_expert_model_parallel_rank() if ps.get_expert_model_parallel_world_size() > 1 else None
    return directory / rank_directory_name(ps.get_tensor_model_parallel_rank(), pipeline, expert)


def save_torch(
    directory: Path,
    args: argparse.Namespace,
    state: TrainState,
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
) -> None:
    """Write the files of all ranks. All ranks call this and either all succeed or all raise."""
    own = own_directory(directory)
    writes = parallel_state.get_expert_data_parallel_rank() == 0
    with together(f"cannot write {directory}"):
        if writes:
            own.mkdir(exist_ok=True)
    with_optimizer = optimizer is not None and not args.no_save_optim
    with together(f"cannot write {directory}"):
        if with_optimizer and args.use_distributed_optimizer:
            optimizer.save_parameter_state(str(own / DISTRIB_OPTIM_FNAME))  # type: ignore[union-attr]
    contents = {**common_entries(args, state, scheduler), **plain_model(model)}
    if with_optimizer:
        contents["optimizer"] = optimizer.state_dict()  # type: ignore[union-attr]
    if not args.no_save_rng:
        contents["rng_state"] = rng_states_of_replicas()
    with together(f"cannot write {directory}"):
        if writes:
            save_torch_file(contents, own / MODEL_FNAME)
            sync_tree(own)


def read_first_rank(directory: Path) -> dict[str, Any]:
    """Content of the first model-parallel rank's file, which has the arguments of the run."""
    path = find_first_rank_file(directory)
    if path is None:
        raise CheckpointingException(f"{directory} has no mp_rank_00*/{MODEL_FNAME}")
    return read_file(path)


def read_own(directory: Path) -> dict[str, Any]:
    """Content of this model-parallel rank's file."""
    path = own_directory(directory) / MODEL_FNAME
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.glob("mp_rank_*")))
        raise CheckpointingException(
            f"{path} does not exist: a checkpoint of format torch loads only into the tensor and pipeline "
            f"parallel sizes that wrote it (there: {there})"
        )
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """A state dict from a file, without running anything in it."""
    content = safe_torch_load(path)
    if not isinstance(content, dict):
        raise CheckpointingException(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def load_torch_optimizer(directory: Path, args: argparse.Namespace, state_dict: dict[str, Any], optimizer: Any) -> None:
    """Restore the optimizer from this rank's files."""
    optimizer.load_state_dict(state_dict["optimizer"])
    if args.use_distributed_optimizer:
        optimizer.load_parameter_state(str(own_directory(directory) / DISTRIB_OPTIM_FNAME))
