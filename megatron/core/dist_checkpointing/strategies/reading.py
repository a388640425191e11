"""Reading tensors from a checkpoint's files into shards of any layout."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core import CheckpointingException
from ..mapping import ShardedBase, ShardedObject, ShardedTensor
from .catalog import Catalog, Chunk, Place
from .resharding import Box, LocalRead, ReadTarget, narrow, plan_local_read

OpenChunk = Callable[[memoryview, torch.dtype, tuple[int, ...]], torch.Tensor]
"""(the bytes of an entry, its type and shape according to the table of contents) -> the tensor, as a view."""


@dataclass(frozen=True)
class ChunkRead:
    """A part of a stored chunk on its way into a target. `box` is in the coordinates of the stored tensor."""

    chunk: Chunk
    box: Box
    target: ReadTarget


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


def plan_reads(catalog: Catalog, targets: Iterable[ReadTarget]) -> list[ChunkRead]:
    """Which stored chunk fills which part of which target.

    Raises:
        CheckpointingException: the chunks do not cover a target.
    """
    reads: list[ChunkRead] = []
    for target in targets:
        covered = 0
        for chunk in catalog.tensors[target.key].chunks_near(target.box):
            shared = chunk.box.intersection(target.box)
            if shared is not None:
                covered += shared.numel
                reads.append(ChunkRead(chunk, shared, target))
        if covered != target.box.numel:
            raise CheckpointingException(
                f"{target.key}: only {covered} of {target.box.numel} elements at {target.box.offsets} exist"
            )
    return reads


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
            key, box = places[place][0].target.key, places[place][0].chunk.box
            try:
                source = _open(open_chunk, data, catalog.tensors[key].dtype, box.sizes)
            except CheckpointingException as error:
                raise CheckpointingException(f"{key} in {directory / name}: {error}") from error
            for read in places[place]:
                _copy(read, source)


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


def _copy(read: ChunkRead, source: torch.Tensor) -> None:
    source = narrow(source, read.box.moved(read.chunk.box.offsets, -1))
    destination = narrow(read.target.tensor.detach(), read.box.moved(read.target.box.offsets, -1))
    destination.copy_(source)


def finish_reads(plans: Iterable[LocalRead]) -> None:
    """Move what was read through buffers to where it belongs."""
    for plan in plans:
        for destination, source in plan.copies:
            destination.detach().copy_(source)


def read_bytes(place: Place, directory: Path) -> bytes:
    """The bytes of an entry."""
    with open(directory / place.file, "rb") as file:
        file.seek(place.offset)
        return file.read(place.length)
