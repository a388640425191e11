"""The files of a `torch_dist` checkpoint, in the layout of torch's own distributed checkpoint (DCP).

`__<rank>_<n>.distcp` files hold one `torch.save` archive after the other, one for each chunk of a tensor and
for each object. `.metadata` is a pickled `Metadata` that says which tensors exist, how they are cut, and
where each archive lies. Tensors that were flattened have their original shape in its attribute `mcore_data`.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..core import CheckpointingException
from ..mapping import ShardedObject
from ..safe_load import load_dcp_metadata, safe_torch_load
from .durable_file import durable_file
from .resharding import LocalRead, ReadTarget, Shape

METADATA_FNAME = ".metadata"
DATA_SUFFIX = ".distcp"
ORIGINAL_SHAPE = "nd_reformulated_orig_global_shape"


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
        """What the metadata needs."""
        return TensorEntry(self.key, self.offsets, self.sizes, self.stored_shape, self.original_shape, self.dtype, None)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class ObjectEntry:
    """A pickled object of the given unique key."""

    key: str
    data: bytes

    def without_data(self) -> ObjectEntry:
        """What the metadata needs."""
        return ObjectEntry(self.key, b"")

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return len(self.data)


Entry = TensorEntry | ObjectEntry


@dataclass(frozen=True)
class Written:
    """Where an entry lies; `entry` has no data."""

    entry: Entry
    file: str
    offset: int
    length: int


# ---- writing ----


def pickle_object(data: object) -> bytes:
    """Bytes of a sharded object: `torch.save` of a list of it."""
    buffer = io.BytesIO()
    torch.save([data], buffer)
    return buffer.getvalue()


def write_entries(
    entries: list[Entry], directory: Path, rank: int, num_files: int, separation_hint: str | None = None
) -> list[Written]:
    """Write `entries` to at most `num_files` files of `rank`, in parallel; they are on the disk on return."""
    groups = {"": [e for e in entries if not _separate(e, separation_hint)]}
    if separation_hint is not None:
        groups[separation_hint] = [e for e in entries if _separate(e, separation_hint)]
    files = [
        (f"{prefix}__{rank}_{n}{DATA_SUFFIX}", part)
        for prefix, group in groups.items()
        for n, part in enumerate(_even_parts(group, num_files))
    ]
    with ThreadPoolExecutor(max(1, num_files)) as pool:
        jobs = [pool.submit(_write_file, directory / name, part) for name, part in files]
        return [written for job in jobs for written in job.result()]


def _separate(entry: Entry, separation_hint: str | None) -> bool:
    return separation_hint is not None and entry.key.startswith(separation_hint)


def _even_parts(entries: list[Entry], count: int) -> list[list[Entry]]:
    """At most `count` parts of about the same number of bytes, none of them empty."""
    parts: list[list[Entry]] = [[] for _ in range(count)]
    sizes = [0] * count
    for entry in sorted(entries, key=lambda e: e.num_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(entry)
        sizes[smallest] += entry.num_bytes + 1
    return [part for part in parts if part]


def _write_file(path: Path, entries: list[Entry]) -> list[Written]:
    written = []
    with durable_file(path) as file:
        for entry in entries:
            start = file.tell()
            if isinstance(entry, ObjectEntry):
                file.write(entry.data)
            else:
                torch.save(_compact(entry), file)
            written.append(Written(entry.without_data(), path.name, start, file.tell() - start))
    return written


def _compact(entry: TensorEntry) -> torch.Tensor:
    """The chunk on the CPU, owning no more memory than it shows: `torch.save` stores the memory, not the
    view."""
    assert entry.data is not None
    data = entry.data.detach().cpu().reshape(entry.sizes).contiguous()
    return data.clone() if data.untyped_storage().nbytes() != entry.num_bytes else data


def build_metadata(written: Iterable[Written]) -> Metadata:
    """Table of contents of what all ranks have written."""
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    original: dict[str, dict[str, Any]] = {}
    for item in written:
        entry = item.entry
        if isinstance(entry, ObjectEntry):
            described[entry.key] = BytesStorageMetadata()
            index = MetadataIndex(entry.key)
        else:
            if entry.key not in described:
                properties = TensorProperties(dtype=entry.dtype)
                described[entry.key] = TensorStorageMetadata(properties, torch.Size(entry.stored_shape), [])
            tensor = described[entry.key]
            assert isinstance(tensor, TensorStorageMetadata)
            index = MetadataIndex(entry.key, entry.offsets, len(tensor.chunks))
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes)))
            if entry.original_shape is not None:
                original[entry.key] = {ORIGINAL_SHAPE: tuple(entry.original_shape)}
        places[index] = _StorageInfo(item.file, item.offset, item.length)
    metadata = Metadata(described, planner_data=None, storage_data=places, storage_meta=StorageMeta())
    metadata.mcore_data = original  # type: ignore[attr-defined]
    return metadata


def write_metadata(metadata: Metadata, directory: Path) -> None:
    """Write `.metadata`: whole or not at all."""
    partial = directory / (METADATA_FNAME + ".partial")
    with durable_file(partial) as file:
        pickle.dump(metadata, file)
    os.replace(partial, directory / METADATA_FNAME)


# ---- reading ----


def read_metadata(directory: Path) -> Metadata:
    """Table of contents of a checkpoint."""
    try:
        return load_dcp_metadata(directory / METADATA_FNAME)
    except FileNotFoundError:
        raise CheckpointingException(f"{directory / METADATA_FNAME} is missing: the checkpoint is incomplete") from None


def original_shape(metadata: Metadata, key: str) -> Shape | None:
    """Shape of the global tensor if the checkpoint holds it flattened, else None."""
    entry = (getattr(metadata, "mcore_data", None) or {}).get(key) or {}
    shape = entry.get(ORIGINAL_SHAPE)
    return None if shape is None else tuple(shape)


def global_shape_of(metadata: Metadata, key: str) -> Shape:
    """Shape of the global tensor, however it is stored."""
    original = original_shape(metadata, key)
    return tuple(_stored_tensor(metadata, key).size) if original is None else original


def find_damage(metadata: Metadata, directory: Path, indices: Iterable[MetadataIndex] | None = None) -> list[str]:
    """Files that are missing or shorter than the metadata says, among those that hold `indices` (default:
    all)."""
    ends: dict[str, int] = defaultdict(int)
    places = metadata.storage_data
    for place in places.values() if indices is None else (places[i] for i in indices if i in places):
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
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


def plan_reads(metadata: Metadata, targets: list[ReadTarget]) -> list[tuple[ReadItem, ReadTarget]]:
    """Which stored chunk fills which part of which target.

    Raises:
        CheckpointingException: the chunks do not cover a target.
    """
    by_key: dict[str, list[ReadTarget]] = defaultdict(list)
    for target in targets:
        by_key[target.key].append(target)
    reads: list[tuple[ReadItem, ReadTarget]] = []
    for key, wanted in by_key.items():
        chunks = [ChunkStorageMetadata(torch.Size(t.box.offsets), torch.Size(t.box.sizes)) for t in wanted]
        covered = [0] * len(wanted)
        for item in create_read_items_for_chunk_list(key, _stored_tensor(metadata, key), chunks):
            number = item.dest_index.index
            assert number is not None
            covered[number] += prod(item.lengths)
            reads.append((item, wanted[number]))
        for target, count in zip(wanted, covered):
            if count != target.box.numel:
                raise CheckpointingException(
                    f"{key}: only {count} of {target.box.numel} elements at {target.box.offsets} exist"
                )
    return reads


def _stored_tensor(metadata: Metadata, key: str) -> TensorStorageMetadata:
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    return stored


def read_tensors(reads: list[tuple[ReadItem, ReadTarget]], metadata: Metadata, directory: Path) -> None:
    """Copy stored chunks into their targets. Each chunk is read once."""
    wanted: dict[MetadataIndex, list[tuple[ReadItem, ReadTarget]]] = defaultdict(list)
    for item, target in reads:
        wanted[item.storage_index].append((item, target))
    for index, stream in _open_entries(wanted, metadata, directory):
        tensor = safe_torch_load(stream, name=stream.name)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointingException(f"{index.fqn}: expected a tensor in {stream.name}")
        for item, target in wanted[index]:
            source, destination = tensor, target.tensor.detach()
            for axis, length in enumerate(item.lengths):
                source = source.narrow(axis, item.storage_offsets[axis], length)
                destination = destination.narrow(axis, item.dest_offsets[axis], length)
            destination.copy_(source)


def finish_reads(plans: Iterable[LocalRead]) -> None:
    """Move what was read through buffers to where it belongs."""
    for plan in plans:
        for destination, source in plan.copies:
            destination.detach().copy_(source)


def read_objects(objects: Iterable[ShardedObject], metadata: Metadata, directory: Path) -> dict[str, Any]:
    """Unique key -> object."""
    found: dict[str, Any] = {}
    for index, stream in _open_entries([MetadataIndex(o.unique_key) for o in objects], metadata, directory):
        content = safe_torch_load(stream, name=stream.name)
        if not (isinstance(content, list) and len(content) == 1):
            raise CheckpointingException(f"{index.fqn}: expected a list of one object in {stream.name}")
        found[index.fqn] = content[0]
    return found


def _open_entries(
    indices: Iterable[MetadataIndex], metadata: Metadata, directory: Path
) -> Iterator[tuple[MetadataIndex, FileSlice]]:
    """(index, its bytes) in the order in which they lie on the disk."""
    places = [(metadata.storage_data[index], index) for index in set(indices)]
    places.sort(key=lambda item: (item[0].relative_path, item[0].offset))
    file: IO[bytes] | None = None
    try:
        for place, index in places:
            path = directory / place.relative_path
            if file is None or file.name != str(path):
                if file is not None:
                    file.close()
                file = open(path, "rb")  # noqa: SIM115  # stays open for the next entries
            yield index, FileSlice(file, place.offset, place.length)
    finally:
        if file is not None:
            file.close()


class FileSlice(io.RawIOBase):  # what torch.load needs of IO[bytes]
    """Part of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0
        self.name = file.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._offset + self._position)
        read = self._file.readinto(view[:count])  # type: ignore[attr-defined]
        self._position += read
        return read
