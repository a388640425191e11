"""What a checkpoint of any kind holds, and how two of them differ, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.sharded_files import whole_tensor
from megatron.core.export import HFFolder, HFState, WholeState
from megatron.core.export.rank_files import RankFilesState
from megatron.core.export.sharded_state import ShardedState
from megatron.training.checkpoint.conversion import find_directory
from megatron.training.checkpoint.find import SHARDED_FORMATS, read_catalog_of
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.checkpoint.paths import detect_format


@dataclass(frozen=True)
class TensorInfo:
    """A whole tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """A checkpoint's tensors, and what else is to be said of it."""

    name: str
    format: str
    iteration: int
    arguments: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    model: WholeState
    objects: tuple[str, ...] = field(default=())

    @property
    def stored_alike(self) -> bool:
        """Whether names and shapes are those of a sharded checkpoint, optimizer included."""
        return self.format in SHARDED_FORMATS

    def of_model(self) -> Contents:
        """The same with the model's parameters alone, layer by layer."""
        tensors = tensors_of(self.model)
        return Contents(self.name, self.format, self.iteration, self.arguments, tensors, self.model)


def tensors_of(state: WholeState) -> dict[str, TensorInfo]:
    """All parameters of a model."""

    def info(name: str) -> TensorInfo:
        meta = state.meta(name)
        return TensorInfo(tuple(meta.shape), meta.dtype, lambda: state.read(name))

    return {name: info(name) for name in state}


def open_contents(name: str) -> Contents:
    """A checkpoint by its folder, its directory, or `hf:DIR`.

    Raises:
        CheckpointingException: there is none, or it is damaged.
    """
    hf = hf_directory(name)
    if hf is not None:
        state = HFState(HFFolder(hf))
        return Contents(name, "hf", 0, state.folder.config, tensors_of(state), state)
    directory = find_directory(name)
    kind = detect_format(directory)
    if kind in SHARDED_FORMATS:
        common = dist_checkpointing.load_common_state_dict(directory)
        return _contents(directory, kind, common, _stored(directory), ShardedState(directory), _objects(directory))
    if kind == "torch":
        files = RankFilesState(directory)
        return _contents(directory, "torch (legacy)" if files.legacy else kind, files.common, tensors_of(files), files)
    raise CheckpointingException(f"{directory} has format {kind}, which cannot be read")


def _contents(
    directory: Path,
    kind: str,
    common: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    model: WholeState,
    objects: Iterable[str] = (),
) -> Contents:
    saved = common.get("args")
    arguments = vars(saved) if isinstance(saved, argparse.Namespace) else {}
    return Contents(str(directory), kind, common.get("iteration", 0), arguments, tensors, model, tuple(objects))


def _objects(directory: Path) -> Iterable[str]:
    return read_catalog_of(directory).objects


def _stored(directory: Path) -> dict[str, TensorInfo]:
    """All tensors under the names that are stored."""
    strategy = get_default_load_sharded_strategy(directory)

    def info(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorInfo:
        return TensorInfo(shape, dtype, lambda: strategy.load({key: whole_tensor(key, shape, dtype)}, directory)[key])

    catalog = read_catalog_of(directory)
    return {key: info(key, stored.global_shape, stored.dtype) for key, stored in catalog.tensors.items()}


def tensor_differences(
    first: Contents, second: Contents, names: Iterable[str], tolerance: float, on_progress: Callable[[int], None]
) -> list[str]:
    """Shapes, types and values in which tensors of the same name differ."""
    lines = []
    for name in names:
        a, b = first.tensors[name], second.tensors[name]
        if a.shape != b.shape:
            lines.append(f"{name}: shape {list(a.shape)} against {list(b.shape)}")
        else:
            if a.dtype != b.dtype:
                lines.append(f"{name}: {a.dtype} against {b.dtype}")
            difference = (a.read().double() - b.read().double()).abs()
            unequal = ~(difference <= tolerance)  # NaN is not equal to anything
            if unequal.any():
                largest = difference.max().item()
                lines.append(
                    f"{name}: {int(unequal.sum())} of {unequal.numel()} elements differ, by up to {largest:.3g}"
                )
        on_progress(a.num_bytes)
    return lines
