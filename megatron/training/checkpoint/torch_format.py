"""The `torch` format: one file for each model-parallel rank, which only the same layout can read.

`mp_rank_<tensor>[_<pipeline>]/model_optim_rng.pt` holds everything, except that the sharded state of a
distributed optimizer lies beside it in `distrib_optim.pt`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.collective import together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.durable import FileRecord, checksum_of_file, sync_directory
from megatron.core.dist_checkpointing.manifest import write_manifest
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from megatron.core.dist_checkpointing.strategies.sharded_files import gather_to_first
from megatron.core.dist_checkpointing.strategies.torch_files import save_torch_file
from megatron.training.checkpoint.data import stateful_part
from megatron.training.checkpoint.paths import (
    DISTRIB_OPTIM_FNAME,
    MODEL_FNAME,
    OWN_PLACE,
    Place,
    find_first_rank_file,
)
from megatron.training.checkpoint.state import common_entries, plain_model, rng_states_of_replicas
from megatron.training.train_state import TrainState


def save_torch(
    directory: Path,
    args: argparse.Namespace,
    state: TrainState,
    model: list[nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    data_iterator: Any = None,
    place: Place = OWN_PLACE,
) -> None:
    """Write the files of all ranks and their manifest. All ranks call this and either all succeed or all raise."""
    own = directory / place.directory_name()
    writes = parallel_state.get_expert_data_parallel_rank() == 0
    with together(f"cannot write {directory}"):
        own.mkdir(exist_ok=True)
    with_optimizer = optimizer is not None and not args.no_save_optim
    sharded = bool(with_optimizer and args.use_distributed_optimizer)
    with together(f"cannot write {directory}"):
        if sharded:
            optimizer.save_parameter_state(str(own / DISTRIB_OPTIM_FNAME))  # type: ignore[union-attr]
    contents = {**common_entries(args, state, scheduler), **plain_model(model)}
    if with_optimizer:
        contents["optimizer"] = optimizer.state_dict()  # type: ignore[union-attr]
    if not args.no_save_rng:
        contents["rng_state"] = rng_states_of_replicas()
    records: dict[Path, FileRecord] = {}
    with together(f"cannot write {directory}"):
        if writes:
            records[own / MODEL_FNAME] = save_torch_file(contents, own / MODEL_FNAME)
        if sharded and writes and (own / DISTRIB_OPTIM_FNAME).exists():
            records[own / DISTRIB_OPTIM_FNAME] = record_of(own / DISTRIB_OPTIM_FNAME)
        position = stateful_part(data_iterator)
        if position is not None:
            path = own / data_fname()
            records[path] = save_torch_file({"dataloader_state_dict": position.state_dict()}, path)
        if records:
            sync_directory(own)
    everything = gather_to_first({str(path.relative_to(directory)): record for path, record in records.items()})
    with together(f"cannot complete {directory}"):
        if everything is not None:
            write_manifest(directory, {name: record for part in everything for name, record in part.items()})
            sync_directory(directory)


def data_fname() -> str:
    """File with the position of this data parallel rank's iterator."""
    return f"train_dataloader_dprank{parallel_state.get_data_parallel_rank():03d}.pt"


def record_of(path: Path) -> FileRecord:
    """Bring a file that somebody else has written to the disk; what it is."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return FileRecord(path.stat().st_size, checksum_of_file(path))


def read_position(directory: Path) -> Any:
    """Position of this data parallel rank's iterator; None if it was not saved."""
    path = directory / OWN_PLACE.directory_name() / data_fname()
    return read_file(path).get("dataloader_state_dict") if path.is_file() else None


def read_first_rank(directory: Path) -> dict[str, Any]:
    """Content of the first model-parallel rank's file, which has the arguments of the run."""
    path = find_first_rank_file(directory)
    if path is None:
        raise CheckpointingException(f"{directory} has no mp_rank_00*/{MODEL_FNAME}")
    return read_file(path)


def read_own(directory: Path) -> dict[str, Any]:
    """Content of this model-parallel rank's file."""
    path = directory / OWN_PLACE.directory_name() / MODEL_FNAME
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.glob("mp_rank_*")))
        raise CheckpointingException(
            f"{path} does not exist: a checkpoint of format torch loads only into the tensor and pipeline "
            f"parallel sizes that wrote it (there: {there}); tools/checkpoint/convert.py writes its weights for others"
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
        older = bool(getattr(args, "ckpt_convert_update_legacy_dist_opt_format", False))
        path = directory / OWN_PLACE.directory_name() / DISTRIB_OPTIM_FNAME
        optimizer.load_parameter_state(str(path), update_legacy_format=older)
