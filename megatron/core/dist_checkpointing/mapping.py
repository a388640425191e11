"""Values that describe the local part of a global state: which tensor or object it belongs to, and where it
lies.

A state dict of these values says nothing about ranks: a `ShardedTensor` is a box inside a global tensor, a
`ShardedObject` a cell of a grid of objects. What one layout writes, every other layout can therefore read.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import torch

from .core import CheckpointingException
from .dict_utils import dict_list_map_inplace

# One dictionary tree with plain values, and one whose leaves may be the classes of this file.
StateDict = dict[str, Any]
CommonStateDict = dict[str, Any]
ShardedStateDict = dict[str, Any]
ReplicaId = int | tuple[int, ...]


class ShardedBase(ABC):
    """A leaf of a sharded state dict: something named `key`, of which this process holds the copy
    `replica_id`."""

    key: str
    data: object
    replica_id: ReplicaId

    @abstractmethod
    def validate_metadata_integrity(self) -> None:
        """Raise `CheckpointingException` if the fields contradict each other."""

    @abstractmethod
    def without_data(self) -> ShardedBase:
        """The same description with `data` None."""


@dataclass(eq=False)
class ShardedTensor(ShardedBase):
    """A box of the global tensor `key`.

    `local_shape` is the shape of the box without the `prepend_axis_num` leading axes of length 1 that exist
    only in the global tensor (a stack of layers, say). `global_shape` and `global_offset` include those axes.

    With `flattened_range` the process holds only that range of the row-major flattened box, as a 1-D `data`.
    """

    key: str
    data: torch.Tensor | None = field(repr=False)
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None
    """Number of equal boxes along each global axis; None when the boxes do not form a regular grid."""
    replica_id: ReplicaId = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False
    """The checkpoint may hold another global shape (padded vocabularies): what overlaps is read, the rest is
    zero."""
    flattened_range: slice | None = None

    def __post_init__(self) -> None:
        self.validate_metadata_integrity()

    def validate_metadata_integrity(self) -> None:
        """Check shapes, offsets, grid and data against each other."""
        rank = len(self.global_shape)
        if len(self.global_offset) != rank or self.prepend_axis_num + len(self.local_shape) != rank:
            raise CheckpointingException(f"numbers of axes do not agree in {self}")
        if self.axis_fragmentations is not None and len(self.axis_fragmentations) != rank:
            raise CheckpointingException(f"axis_fragmentations has not {rank} axes in {self}")
        for axis, (offset, length) in enumerate(zip(self.global_offset, self.shape_in_global)):
            if offset < 0 or offset + length > self.global_shape[axis] and not self.allow_shape_mismatch:
                raise CheckpointingException(f"axis {axis} of the shard lies outside of the global tensor: {self}")
            if self.axis_fragmentations is not None and length and offset % length:
                raise CheckpointingException(f"axis {axis} of the shard is not aligned to the grid: {self}")
        if self.flattened_range is not None:
            self._validate_flattened_range(self.flattened_range)
        if self.data is not None:
            self._validate_data(self.data)

    def _validate_flattened_range(self, flattened_range: slice) -> None:
        start, stop, step = flattened_range.start, flattened_range.stop, flattened_range.step
        if step is not None or start is None or stop is None or not 0 <= start <= stop <= prod(self.local_shape):
            raise CheckpointingException(f"flattened_range is no contiguous range of the shard: {self}")

    def _validate_data(self, data: torch.Tensor) -> None:
        if data.dtype != self.dtype:
            raise CheckpointingException(f"data has dtype {data.dtype}, expected {self.dtype} in {self}")
        if tuple(data.shape) != self.data_shape:
            raise CheckpointingException(f"data has shape {tuple(data.shape)}, expected {self.data_shape} in {self}")

    @property
    def shape_in_global(self) -> tuple[int, ...]:
        """Extent of the box along every global axis, prepended ones included."""
        return (1,) * self.prepend_axis_num + tuple(self.local_shape)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape that `data` has: the box, or the length of its flattened range."""
        if self.flattened_range is None:
            return tuple(self.local_shape)
        return (self.flattened_range.stop - self.flattened_range.start,)

    def has_regular_sharding_grid(self) -> bool:
        """Whether the global tensor is cut into equal boxes along each axis."""
        return self.axis_fragmentations is not None

    def global_slice(self) -> tuple[int | slice, ...]:
        """Index that selects the box from the global tensor; prepended axes are selected by an integer."""
        n = self.prepend_axis_num
        lengths = zip(self.global_offset[n:], self.local_shape, strict=True)
        return tuple(chain(self.global_offset[:n], (slice(off, off + length) for off, length in lengths)))

    def local_coordinates(self) -> tuple[np.ndarray, ...]:
        """Coordinates inside the box of each element of the flattened range, one array per local axis."""
        if self.flattened_range is None:
            raise CheckpointingException(f"local_coordinates needs a flattened_range: {self}")
        flat = np.arange(self.flattened_range.start, self.flattened_range.stop)
        return np.unravel_index(flat, self.local_shape)

    def global_coordinates(self) -> tuple[np.ndarray, ...]:
        """Coordinates in the global tensor of each element of the flattened range, one array per global
        axis."""
        inside = self.local_coordinates()
        count = self.data_shape[0]
        prepended = (np.zeros(count, dtype=np.int64) for _ in range(self.prepend_axis_num))
        return tuple(c + off for c, off in zip(chain(prepended, inside), self.global_offset, strict=True))

    def local_chunk_offset_in_global(self) -> tuple[int, ...]:
        """Position of the box in the grid of boxes."""
        if self.axis_fragmentations is None:
            raise CheckpointingException(f"only a regular grid has chunk positions: {self}")
        n = self.prepend_axis_num
        positions = (off // max(length, 1) for off, length in zip(self.global_offset[n:], self.local_shape))
        return tuple(chain(self.global_offset[:n], positions))

    def max_allowed_chunks(self) -> tuple[int, ...]:
        """Number of boxes along each global axis."""
        chunks = []
        for total, length in zip(self.global_shape, self.shape_in_global, strict=True):
            if length == 0 or (total % length and not self.allow_shape_mismatch):
                raise CheckpointingException(f"the global shape is no multiple of the shard: {self}")
            chunks.append(total // length)
        return tuple(chunks)

    def without_data(self) -> ShardedTensor:
        """The same description with `data` None."""
        return replace(self, data=None)

    @classmethod
    def from_rank_offsets(
        cls,
        key: str,
        data: torch.Tensor,
        *rank_offsets: tuple[int, int, int],
        replica_id: ReplicaId = 0,
        prepend_axis_num: int = 0,
        flattened_range: None = None,
        **init_kwargs: Any,
    ) -> ShardedTensor:
        """The box `data` of a regular grid.

        Args:
            key: name of the global tensor.
            data: the box, without prepended axes.
            rank_offsets: (global axis, position, number of boxes) for every axis that is cut or prepended.
                Axes not mentioned are whole; a prepended axis not mentioned has length 1.
            replica_id: which copy of the box this is; only the one that is all zeros is written.
            prepend_axis_num: number of leading axes that only the global tensor has.
            flattened_range: not allowed here, see `from_rank_offsets_flat`.
            init_kwargs: further fields, such as `allow_shape_mismatch`.
        """
        if flattened_range is not None:
            raise ValueError("flattened_range is for from_rank_offsets_flat, from_rank_offsets takes a whole shard")
        local_shape = tuple(data.shape)
        shape = [1] * prepend_axis_num + list(local_shape)
        global_shape, offsets, fragmentations = list(shape), [0] * len(shape), [1] * len(shape)
        mentioned: set[int] = set()
        for axis, position, count in rank_offsets:
            if not 0 <= axis < len(shape) or axis in mentioned:
                raise CheckpointingException(f"axis {axis} in rank_offsets of {key} is repeated or not in {shape}")
            if not 0 <= position < count:
                raise CheckpointingException(f"position {position} of {count} on axis {axis} of {key} does not exist")
            mentioned.add(axis)
            global_shape[axis] = shape[axis] * count
            offsets[axis] = shape[axis] * position
            fragmentations[axis] = count
        return cls(
            key,
            data,
            data.dtype,
            local_shape,
            tuple(global_shape),
            tuple(offsets),
            tuple(fragmentations),
            replica_id=replica_id,
            prepend_axis_num=prepend_axis_num,
            **init_kwargs,
        )

    @classmethod
    def from_rank_offsets_flat(
        cls,
        key: str,
        data: torch.Tensor,
        non_flat_local_shape: tuple[int, ...],
        *args: tuple[int, int, int],
        flattened_range: slice | None = None,
        **kwargs: Any,
    ) -> ShardedTensor:
        """A range of the flattened box of shape `non_flat_local_shape`; further arguments as
        `from_rank_offsets`.

        `data` is 1-D with the elements of `flattened_range`.
        """
        if flattened_range is None:
            raise CheckpointingException(f"from_rank_offsets_flat needs a flattened_range ({key})")
        if data.ndim != 1:
            raise CheckpointingException(f"{key}: flattened data has one axis, got shape {tuple(data.shape)}")
        box = torch.empty(non_flat_local_shape, dtype=data.dtype, device="meta")
        whole = cls.from_rank_offsets(key, box, *args, **kwargs)
        return replace(whole, data=data, flattened_range=flattened_range)

    def init_data(self, device: str | torch.device, init_fn: Callable[..., torch.Tensor] = torch.empty) -> None:
        """Give a description without data a tensor made by `init_fn`."""
        if self.data is None:
            self.data = init_fn(self.data_shape, dtype=self.dtype, device=device)

    def narrow(self, dim: int, start: int, length: int) -> list[ShardedTensor]:
        """The tensor that results when every process narrows its box along the local axis `dim`.

        One element, or none if the flattened range lies outside of the narrowed box (then `dim` must be 0).
        """
        axis, old = dim + self.prepend_axis_num, self.local_shape[dim]

        def scaled(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(v * length // old if i == axis else v for i, v in enumerate(values))

        description = replace(
            self.without_data(),
            flattened_range=None,
            local_shape=tuple(length if i == dim else n for i, n in enumerate(self.local_shape)),
            global_shape=scaled(self.global_shape),
            global_offset=scaled(self.global_offset),
        )
        if self.flattened_range is None:
            data = None if self.data is None else self.data.narrow(dim, start, length)
            return [replace(description, data=data)]
        if dim != 0:
            raise CheckpointingException(f"a flattened shard can be narrowed along axis 0 only, not {dim}: {self}")
        row = prod(self.local_shape[1:])
        first, last = start * row, (start + length) * row
        begin, end = max(self.flattened_range.start, first), min(self.flattened_range.stop, last)
        if begin >= end:
            return []
        offset = self.flattened_range.start
        data = None if self.data is None else self.data[begin - offset : end - offset]
        return [replace(description, data=data, flattened_range=slice(begin - first, end - first))]


def is_main_replica(replica_id: ReplicaId) -> bool:
    """Whether this copy is the one that is written: every component of its number is zero."""
    return replica_id == 0 if isinstance(replica_id, int) else all(r == 0 for r in replica_id)


class LocalNonpersistentObject:
    """A value that is not saved: a load returns the one that the caller handed in."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def unwrap(self) -> Any:
        """The value itself."""
        return self.obj


@dataclass(eq=False)
class ShardedObject(ShardedBase):
    """Cell `global_offset` of a grid `global_shape` of arbitrary objects under one name."""

    key: str
    data: object
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: ReplicaId = 0

    def __post_init__(self) -> None:
        self.validate_metadata_integrity()

    def validate_metadata_integrity(self) -> None:
        """Check that the cell lies in the grid."""
        inside = len(self.global_shape) == len(self.global_offset) and all(
            0 <= off < size for off, size in zip(self.global_offset, self.global_shape)
        )
        if not inside:
            raise CheckpointingException(f"cell {self.global_offset} is not in grid {self.global_shape} of {self.key}")

    def without_data(self) -> ShardedObject:
        """The same description with `data` None."""
        return replace(self, data=None)

    @property
    def unique_key(self) -> str:
        """Name of the entry on disk, `<key>/shard_<cell>_<grid>`."""
        cell, grid = (".".join(map(str, numbers)) for numbers in (self.global_offset, self.global_shape))
        return f"{self.key}/shard_{cell}_{grid}"

    @classmethod
    def empty_from_unique_key(cls, unique_key: str, replica_id: ReplicaId = 0) -> ShardedObject:
        """Inverse of `unique_key`; the result has no data."""
        match = re.fullmatch(r"(.+)/shard_([\d.]*)_([\d.]*)", unique_key, flags=re.DOTALL)
        if match is None:
            raise CheckpointingException(f"{unique_key!r} is not the name of a sharded object")
        cell, grid = (tuple(int(n) for n in part.split(".") if n) for part in match.groups()[1:])
        return cls(match[1], None, grid, cell, replica_id)


FactoryBuildFn = Callable[[str, torch.Tensor, ReplicaId, slice | None], ShardedStateDict]
FactoryMergeFn = Callable[[StateDict], torch.Tensor]


@dataclass(eq=False)
class ShardedTensorFactory(ShardedBase):
    """A tensor whose global form is made of several parts, such as a gated projection.

    `build_fn(key, data, replica_id, flattened_range)` returns a sharded state dict of the parts, and
    `merge_fn` makes the local tensor of the loaded parts.
    """

    key: str
    data: torch.Tensor | None
    build_fn: FactoryBuildFn
    merge_fn: FactoryMergeFn
    replica_id: ReplicaId = 0
    flattened_range: slice | None = None

    def build(self) -> ShardedStateDict:
        """The parts."""
        if self.data is None:
            raise CheckpointingException(f"factory {self.key} has no data to build from")
        return self.build_fn(self.key, self.data, self.replica_id, self.flattened_range)

    def validate_metadata_integrity(self) -> None:
        """Nothing to check before `build`."""

    def without_data(self) -> ShardedTensorFactory:
        """The same description with `data` None."""
        return replace(self, data=None)


def apply_factories(sharded_state_dict: ShardedStateDict) -> None:
    """Replace each factory by its parts, in place."""
    dict_list_map_inplace(lambda x: x.build() if isinstance(x, ShardedTensorFactory) else x, sharded_state_dict)


def apply_factory_merges(x1: Any, x2: Any, key: tuple[str | int, ...] = ()) -> Any:
    """`x1`, where the loaded parts of each factory of `x2` are merged into one tensor. Changes `x1` in place.

    Args:
        x1: loaded values; where `x2` has a factory this has the tree that its `build` made.
        x2: tree of factories; it may lack entries of `x1`. Dictionaries with integer keys match lists.
        key: path to `x1`, for messages.
    """
    if isinstance(x2, ShardedTensorFactory):
        return x2.merge_fn(x1)
    if isinstance(x1, dict) and isinstance(x2, dict):
        missing = [k for k in x2 if k not in x1]
        if missing:
            raise ValueError(f"cannot merge factories at {key}: {missing} was not loaded")
        for k, sub in x2.items():
            x1[k] = apply_factory_merges(x1[k], sub, (*key, k))
        return x1
    if isinstance(x1, list) and isinstance(x2, (list, dict)):
        items = enumerate(x2) if isinstance(x2, list) else x2.items()
        for i, sub in items:
            if not isinstance(i, int) or i >= len(x1):
                raise ValueError(f"cannot merge factories at {key}: entry {i} was not loaded ({len(x1)} entries)")
            x1[i] = apply_factory_merges(x1[i], sub, (*key, i))
        return x1
    raise ValueError(f"cannot merge factories at {key}: {type(x1).__name__} against {type(x2).__name__}")


__all__ = [
    "CommonStateDict",
    "LocalNonpersistentObject",
    "ReplicaId",
    "ShardedBase",
    "ShardedObject",
    "ShardedStateDict",
    "ShardedTensor",
    "ShardedTensorFactory",
    "StateDict",
    "apply_factories",
    "apply_factory_merges",
    "is_main_replica",
]
