"""What a checkpoint holds and where: its table of contents, whatever format the files have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..core import CheckpointingException
from .resharding import Box, Shape


@dataclass(frozen=True)
class TensorEntry:
    """A chunk of a stored tensor."""

    key: str
    offsets: Shape
    sizes: Shape
    stored_shape: Shape
    original_shape: Shape | None
    """Shape of the global tensor if it is stored flattened."""
    dtype: torch.dtype
    data: torch.Tensor | None

    def without_data(self) -> TensorEntry:
        """What the table of contents needs."""
        return replace(self, data=None)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class ObjectEntry:
    """An object of the given unique key."""

    key: str
    data: Any

    def without_data(self) -> ObjectEntry:
        """What the table of contents needs."""
        return ObjectEntry(self.key, None)

    @property
    def num_bytes(self) -> int:
        """Size of the data; 0 while it is not bytes yet."""
        return len(self.data) if isinstance(self.data, bytes) else 0


Entry = TensorEntry | ObjectEntry


@dataclass(frozen=True)
class Place:
    """A range of bytes in a file of the checkpoint."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Written:
    """Where an entry lies; `entry` has no data."""

    entry: Entry
    place: Place


@dataclass(frozen=True)
class Chunk:
    """A box of a stored tensor, and where its bytes are."""

    box: Box
    place: Place


@dataclass
class StoredTensor:
    """A tensor in a checkpoint, in the shape that is stored, and the chunks that make it up."""

    dtype: torch.dtype
    shape: Shape
    original_shape: Shape | None
    """Shape of the global tensor if it is stored flattened."""
    chunks: list[Chunk] = field(default_factory=list)
    _by_first: dict[int, list[Chunk]] | None = field(default=None, repr=False, compare=False)

    @property
    def global_shape(self) -> Shape:
        """Shape of the global tensor, however it is stored."""
        return self.shape if self.original_shape is None else self.original_shape

    def chunks_near(self, box: Box) -> Iterable[Chunk]:
        """The chunks that may share elements with `box`: those in its range of the first axis, where that is cut
        into single slices (a stack of layers), else all."""
        if not self.shape or any(chunk.box.sizes[0] != 1 for chunk in self.chunks[:1]):
            return self.chunks
        if self._by_first is None:
            self._by_first = defaultdict(list)
            for chunk in self.chunks:
                for position in range(chunk.box.offsets[0], chunk.box.stops[0]):
                    self._by_first[position].append(chunk)
        near = (c for i in range(box.offsets[0], box.stops[0]) for c in self._by_first.get(i, ()))
        return {id(chunk): chunk for chunk in near}.values()


@dataclass
class Catalog:
    """Tensors and objects of a checkpoint by name. Objects have their unique keys."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    objects: dict[str, Place] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors or key in self.objects

    def add(self, item: Written) -> None:
        """Take up an entry that was written."""
        entry = item.entry
        if isinstance(entry, ObjectEntry):
            self.objects[entry.key] = item.place
            return
        if entry.key not in self.tensors:
            self.tensors[entry.key] = StoredTensor(entry.dtype, entry.stored_shape, entry.original_shape)
        self.tensors[entry.key].chunks.append(Chunk(Box(entry.offsets, entry.sizes), item.place))

    def places(self, keys: Iterable[str] | None = None) -> list[Place]:
        """Where the entries of these names lie (default: all)."""
        wanted = [*self.tensors, *self.objects] if keys is None else keys
        found: list[Place] = []
        for key in wanted:
            if key in self.objects:
                found.append(self.objects[key])
            elif key in self.tensors:
                found += [chunk.place for chunk in self.tensors[key].chunks]
        return found


def catalog_of(written: Iterable[Written]) -> Catalog:
    """Table of contents of what all ranks have written."""
    catalog = Catalog()
    for item in written:
        catalog.add(item)
    return catalog


def find_damage(places: Iterable[Place], directory: Path) -> list[str]:
    """Which of the files with these places are missing or too short."""
    ends: dict[str, int] = defaultdict(int)
    for place in places:
        ends[place.file] = max(ends[place.file], place.offset + place.length)
    problems = []
    for name, end in sorted(ends.items()):
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            problems.append(f"{directory / name} is missing")
            continue
        if size < end:
            problems.append(f"{directory / name} is truncated: it has {size} bytes, {end} were written")
    return problems


def raise_if_damaged(places: Iterable[Place], directory: Path) -> None:
    """Raise if files are missing or truncated."""
    problems = find_damage(places, directory)
    if problems:
        raise CheckpointingException("\n".join(problems))
