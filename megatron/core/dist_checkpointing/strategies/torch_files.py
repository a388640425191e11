"""The files of a `torch_dist` checkpoint, in the layout of torch's own distributed checkpoint (DCP).

`__<rank>_<n>.distcp` files hold one `torch.save` archive after the other, one for each chunk of a tensor and
for each object. `.metadata` is a pickled `Metadata` that says which tensors exist, how they are cut, and
where each archive lies. Tensors that were flattened have their original shape in its attribute `mcore_data`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

from ..core import CheckpointingException
from ..dcp_metadata import load_dcp_metadata
from ..durable import FileRecord
from ..durable.file import durable_file
from ..mapping import ShardedObject
from ..safe_load import safe_torch_load
from .archive import frame, read_tensor
from .catalog import Catalog, Chunk, Entry, ObjectEntry, Place, StoredTensor, Written
from .file_plan import FilePlan, segment_size
from .reading import read_bytes
from .resharding import Box, Shape

METADATA_FNAME = ".metadata"
DATA_SUFFIX = ".distcp"
ORIGINAL_SHAPE = "nd_reformulated_orig_global_shape"


# ---- writing ----


def pickled(data: object) -> bytes:
    """What `torch.save` writes of something."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def save_torch_file(data: object, path: Path) -> FileRecord:
    """`torch.save` that has reached the disk when it returns."""
    with durable_file(path) as (file, record):
        torch.save(data, file)  # type: ignore[arg-type]  # all that torch needs of a file is there
    return record[0]


def make_data_file(name: str, entries: list[Entry]) -> FilePlan:
    """A file with one archive for each entry."""
    plan = FilePlan(name)
    offset = 0
    for entry in entries:
        segments = _archive(entry, offset)
        length = sum(map(segment_size, segments))
        plan.segments += segments
        plan.written.append(Written(entry.without_data(), Place(name, offset, length)))
        offset += length
    return plan


def _archive(entry: Entry, offset: int) -> list[bytes | torch.Tensor]:
    if isinstance(entry, ObjectEntry):
        return [pickled([entry.data])]
    assert isinstance(entry.data, torch.Tensor)
    around = frame(entry.dtype, entry.sizes, offset)
    if around is None:
        return [pickled(entry.data.detach().cpu().reshape(entry.sizes).clone())]
    return [around[0], entry.data, around[1]]


def dcp_metadata(catalog: Catalog) -> Metadata:
    """A table of contents as torch's readers know it."""
    described: dict[str, Any] = {key: BytesStorageMetadata() for key in catalog.objects}
    places: dict[MetadataIndex, _StorageInfo] = {
        MetadataIndex(key): _StorageInfo(p.file, p.offset, p.length) for key, p in catalog.objects.items()
    }
    original: dict[str, dict[str, Any]] = {}
    for key, tensor in catalog.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.box.offsets), torch.Size(c.box.sizes)) for c in tensor.chunks]
        properties = TensorProperties(dtype=tensor.dtype)
        described[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            place = chunk.place
            index = MetadataIndex(key, chunk.box.offsets, number)
            places[index] = _StorageInfo(place.file, place.offset, place.length)
        original[key] = {}  # every tensor has an entry: other releases ask for it
        if tensor.original_shape is not None:
            original[key][ORIGINAL_SHAPE] = tuple(tensor.original_shape)
    metadata = Metadata(described, planner_data=None, storage_data=places, storage_meta=StorageMeta())
    metadata.mcore_data = original  # type: ignore[attr-defined]
    return metadata


def metadata_file(catalog: Catalog) -> FilePlan:
    """The file `.metadata`."""
    return FilePlan(METADATA_FNAME, [pickle.dumps(dcp_metadata(catalog))])


# ---- reading ----


def read_catalog(directory: Path) -> Catalog:
    """Table of contents of a checkpoint.

    Raises:
        CheckpointingException: `.metadata` is missing, damaged, or names files outside of the directory.
    """
    path = directory / METADATA_FNAME
    try:
        metadata = load_dcp_metadata(path)
    except FileNotFoundError:
        raise CheckpointingException(f"{path} is missing: the checkpoint is incomplete") from None
    try:
        return _catalog_of(metadata)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointingException(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _catalog_of(metadata: Metadata) -> Catalog:
    catalog = Catalog()
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            catalog.tensors[key] = StoredTensor(
                stored.properties.dtype, _shape(stored.size), _original_shape(metadata, key)
            )
    boxes = {
        (key, _shape(chunk.offsets)): Box(_shape(chunk.offsets), _shape(chunk.sizes))
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
        for chunk in stored.chunks
    }
    for index, info in metadata.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored as {info.transform_descriptors}; only plain bytes can be read")
        place = Place(_inside(info.relative_path), _count(info.offset), _count(info.length))
        tensor = catalog.tensors.get(index.fqn)
        if tensor is None:
            catalog.objects[index.fqn] = place
        else:
            offsets = (0,) * len(tensor.shape) if index.offset is None else _shape(index.offset)
            tensor.chunks.append(Chunk(boxes[index.fqn, offsets], place))
    return catalog


def _shape(sizes: Any) -> Shape:
    shape = tuple(int(size) for size in sizes)
    if any(size < 0 for size in shape):
        raise ValueError(f"negative size in {shape}")
    return shape


def _count(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no number of bytes")
    return number


def _inside(name: Any) -> str:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no file of the checkpoint")
    return name


def _original_shape(metadata: Metadata, key: str) -> Shape | None:
    entry = (getattr(metadata, "mcore_data", None) or {}).get(key) or {}
    shape = entry.get(ORIGINAL_SHAPE)
    return None if shape is None else _shape(shape)


def open_chunk(data: memoryview, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """The tensor of an archive, as a view of its bytes where it is a plain one."""
    if frame(dtype, shape, 0) is not None:
        return read_tensor(data)
    tensor = safe_torch_load(io.BytesIO(data), name="archive")
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointingException("it does not hold a tensor")
    return tensor


def read_objects(objects: Iterable[ShardedObject], catalog: Catalog, directory: Path) -> dict[str, Any]:
    """Unique key -> object."""
    found: dict[str, Any] = {}
    for key in {o.unique_key for o in objects}:
        place = catalog.objects[key]
        name = f"{key} in {directory / place.file}"
        content = safe_torch_load(io.BytesIO(read_bytes(place, directory)), name=name)
        if not (isinstance(content, list) and len(content) == 1):
            raise CheckpointingException(f"{name}: expected a list of one object")
        found[key] = content[0]
    return found
