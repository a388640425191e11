"""Reading tensors from a checkpoint's files into shards of any layout."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core import CheckpointingException
from ..mapping import ShardedBase, ShardedObject, ShardedTensor
from .catalog import Catalog, Chunk, Place, StoredTensor
from .resharding import (
    Box,
    CellTarget,
    LocalRead,
    ReadTarget,
    Shape,
    boxes_of_range,
    flat_index,
    narrow,
    plan_local_read,
    row_major_strides,
)

OpenChunk = Callable[[memoryview, torch.dtype, tuple[int, ...]], torch.Tensor]
"""(the bytes of an entry, its type and shape according to the table of contents) -> the tensor, as a view."""


@dataclass(frozen=True)
class ChunkRead:
    """A copy of a part of a stored chunk to where it belongs."""

    key: str
    chunk: Chunk
    part: Box
    """What of the chunk; of a flattened one, in the coordinates of its cell."""
    destination: torch.Tensor
    strides: Shape | None = None
    """Of a part of a flattened chunk: its strides, and the index of its first element in the chunk."""
    first: int = 0

    def copy(self, chunk: torch.Tensor) -> None:
        """Copy from the opened chunk."""
        if self.strides is None:
            source = narrow(chunk, self.part.moved(self.chunk.box.offsets, -1))
        else:
            flat = chunk.reshape(-1)
            source = flat.as_strided(self.part.sizes, self.strides, flat.storage_offset() + self.first)
        self.destination.copy_(source)


def plan_load(values: list[ShardedBase], catalog: Catalog) -> dict[int, LocalRead]:
    """Position in `values` -> how that tensor is filled. Raises with every name and shape that does not fit."""
    plan: dict[int, LocalRead] = {}
    problems: list[str] = []
    for number, value in enumerate(values):
        key = value.unique_key if isinstance(value, ShardedObject) else value.key
        if key not in catalog:
            problems.append(f"{key}: not in the checkpoint")
        elif isinstance(value, ShardedTensor):
            stored = catalog.tensors.get(key)
            if stored is None:
                problems.append(f"{key}: an object in the checkpoint, a tensor expected")
                continue
            value.init_data("cpu")
            try:
                plan[number] = plan_local_read(value, stored.shape, stored.original_shape)
            except CheckpointingException as error:
                problems.append(str(error))
    if problems:
        raise CheckpointingException("the state does not fit the checkpoint:\n  " + "\n  ".join(sorted(set(problems))))
    return plan


def plan_reads(catalog: Catalog, targets: Iterable[ReadTarget | CellTarget]) -> list[ChunkRead]:
    """Which stored chunk fills which part of which target.

    Raises:
        CheckpointingException: the chunks do not cover a target.
    """
    reads: list[ChunkRead] = []
    for target in targets:
        stored = catalog.tensors[target.key]
        parts = _parts_of_cell(stored, target) if isinstance(target, CellTarget) else _parts_of_box(stored, target)
        found = list(parts)
        covered = sum(read.part.numel for read in found)
        if covered != target.box.numel:
            raise CheckpointingException(
                f"{target.key}: only {covered} of {target.box.numel} elements at {target.box.offsets} exist"
            )
        reads += found
    return reads


def _parts_of_box(stored: StoredTensor, target: ReadTarget) -> Iterator[ChunkRead]:
    for chunk in stored.chunks_near(target.box):
        shared = chunk.box.intersection(target.box)
        if shared is not None:
            destination = narrow(target.tensor.detach(), shared.moved(target.box.offsets, -1))
            yield ChunkRead(target.key, chunk, shared, destination)


def _parts_of_cell(stored: StoredTensor, target: CellTarget) -> Iterator[ChunkRead]:
    """Copies out of the ranges of a flattened cell: a range is a union of few boxes of the cell."""
    strides = row_major_strides(target.cell)
    lowest = flat_index(target.box.offsets, target.cell)
    highest = flat_index(tuple(stop - 1 for stop in target.box.stops), target.cell)
    wanted = Box((*target.position, lowest), (1,) * len(target.position) + (highest + 1 - lowest,))
    for chunk in stored.chunks_near(wanted):
        if chunk.box.intersection(wanted) is None:
            continue
        start, stop = chunk.box.offsets[-1], chunk.box.stops[-1]
        for part in boxes_of_range(target.cell, start, stop):
            shared = part.intersection(target.box)
            if shared is not None:
                destination = narrow(target.tensor.detach(), shared.moved(target.box.offsets, -1))
                first = flat_index(shared.offsets, target.cell) - start
                yield ChunkRead(target.key, chunk, shared, destination, strides, first)


def read_tensors(reads: Iterable[ChunkRead], catalog: Catalog, directory: Path, open_chunk: OpenChunk) -> None:
    """Copy stored chunks into their targets, file by file in the order in which they lie on the disk."""
    by_file: dict[str, dict[Place, list[ChunkRead]]] = defaultdict(lambda: defaultdict(list))
    for read in reads:
        by_file[read.chunk.place.file][read.chunk.place].append(read)
    for name, places in by_file.items():
        with open(directory / name, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for place in sorted(places, key=lambda p: p.offset):
            data = memoryview(content)[place.offset : place.offset + place.length]
            _will_need(content, place)
            key, box = places[place][0].key, places[place][0].chunk.box
            try:
                source = _open(open_chunk, data, catalog.tensors[key].dtype, box.sizes)
            except CheckpointingException as error:
                raise CheckpointingException(f"{key} in {directory / name}: {error}") from error
            for read in places[place]:
                read.copy(source)


def _open(open_chunk: OpenChunk, data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = open_chunk(data, dtype, shape)
    if tensor.dtype != dtype or tensor.shape != shape:
        raise CheckpointingException(
            f"it is a {tensor.dtype} tensor of shape {list(tensor.shape)}, the table of contents says {dtype} "
            f"and {list(shape)}"
        )
    return tensor


def _will_need(content: mmap.mmap, place: Place) -> None:
    start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
    content.madvise(mmap.MADV_WILLNEED, start, place.offset + place.length - start)


def read_bytes(place: Place, directory: Path) -> bytes:
    """The bytes of an entry."""
    with open(directory / place.file, "rb") as file:
        file.seek(place.offset)
        return file.read(place.length)
