"""The `safetensors` format: the sharded state in files that any reader of safetensors opens, with an index as JSON.

`__<rank>_<n>.safetensors` hold the chunks of tensors. A chunk that is its whole tensor bears the tensor's name, any
other one `<name>@<offset>.<offset>...`. `checkpoint.index.json` says how chunks make up tensors. Objects are JSON text
in a tensor of bytes; tensors within them are tensors of the same file, `<unique key>#<number>`. Nothing is pickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..collective import rank_and_size
from ..core import CheckpointingException
from ..durable import FileRecord
from ..mapping import ShardedObject, StateDict
from .base import LoadCommonStrategy, SaveCommonStrategy, StrategyAction, register_default_strategy
from .catalog import Catalog, Chunk, Entry, Place, StoredTensor, TensorEntry, Written
from .file_plan import FilePlan, segment_size, write_together
from .json_state import decode, dtype_name, dtype_of, encode, inline_tensor, outline_tensor
from .reading import read_bytes
from .resharding import Box, Shape
from .sharded_files import ShardedFilesLoadStrategy, ShardedFilesSaveStrategy

INDEX_FNAME = "checkpoint.index.json"
COMMON_JSON_FNAME = "common.json"
DATA_SUFFIX = ".safetensors"
_VERSION = 1
_ALIGNMENT = 64
_MOST_HEADER = 100 << 20  # what the safetensors package accepts


# ---- writing ----


def chunk_name(key: str, box: Box, whole: Shape) -> str:
    """Name of a chunk in its file."""
    return key if box.sizes == whole else f"{key}@{'.'.join(map(str, box.offsets))}"


class _Part:
    """A named tensor of a file; `entry` is what it is of the checkpoint, if it is one by itself."""

    def __init__(self, name: str, data: torch.Tensor, shape: Shape, entry: Entry | None) -> None:
        self.name, self.data, self.shape, self.entry = name, data, shape, entry


def _parts(entry: Entry) -> list[_Part]:
    if isinstance(entry, TensorEntry):
        assert entry.data is not None
        name = chunk_name(entry.key, Box(entry.offsets, entry.sizes), entry.stored_shape)
        return [_Part(name, entry.data, entry.sizes, entry)]
    inner: list[_Part] = []

    def put(tensor: torch.Tensor) -> str:
        name = f"{entry.key}#{len(inner)}"
        inner.append(_Part(name, tensor, tuple(tensor.shape), None))
        return name

    text = json.dumps(encode(entry.data, put), allow_nan=False).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return [_Part(entry.key, data, tuple(data.shape), entry), *inner]


def make_data_file(name: str, entries: list[Entry]) -> FilePlan:
    """A safetensors file. Wide types come first, so that every tensor is aligned."""
    parts = [part for entry in entries for part in _parts(entry)]
    parts.sort(key=lambda part: -part.data.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for part in parts:
        size = segment_size(part.data)
        header[part.name] = {
            "dtype": dtype_name(part.data.dtype),
            "shape": list(part.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    plan = FilePlan(name, [struct.pack("<Q", len(text)) + text])
    for part in parts:
        start, stop = header[part.name]["data_offsets"]
        plan.segments.append(part.data)
        if part.entry is not None:
            place = Place(name, 8 + len(text) + start, stop - start)
            plan.written.append(Written(part.entry.without_data(), place))
    return plan


def index_file(catalog: Catalog) -> FilePlan:
    """The index: every tensor with its chunks, every object, and where their bytes are."""
    tensors = {}
    for key, tensor in sorted(catalog.tensors.items()):
        tensors[key] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            **({} if tensor.original_shape is None else {"original_shape": list(tensor.original_shape)}),
            "chunks": [
                {
                    "offsets": list(chunk.box.offsets),
                    "sizes": list(chunk.box.sizes),
                    "name": chunk_name(key, chunk.box, tensor.shape),
                    "place": _place_to_json(chunk.place),
                }
                for chunk in tensor.chunks
            ],
        }
    objects = {key: _place_to_json(place) for key, place in sorted(catalog.objects.items())}
    content = {"version": _VERSION, "tensors": tensors, "objects": objects}
    return FilePlan(INDEX_FNAME, [json.dumps(content).encode()])


def _place_to_json(place: Place) -> list[Any]:
    return [place.file, place.offset, place.length]


class SafetensorsSaveShardedStrategy(ShardedFilesSaveStrategy):
    """Writes safetensors files and their index."""

    data_suffix = DATA_SUFFIX

    def make_file(self, name: str, entries: list[Entry]) -> FilePlan:
        return make_data_file(name, entries)

    def make_catalog_file(self, catalog: Catalog) -> FilePlan:
        return index_file(catalog)

    def own_files(self, directory: Path) -> list[Path]:
        return [directory / INDEX_FNAME, *directory.glob(f"*{DATA_SUFFIX}")]


# ---- reading ----


def read_index(directory: Path) -> Catalog:
    """Table of contents of a checkpoint.

    Raises:
        CheckpointingException: the index is missing, damaged, or names files outside of the directory.
    """
    path = directory / INDEX_FNAME
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            raise CheckpointingException(f"{path} has version {content['version']!r}, this program knows {_VERSION}")
        catalog = Catalog(objects={key: _place(row) for key, row in content["objects"].items()})
        for key, row in content["tensors"].items():
            original = row.get("original_shape")
            tensor = StoredTensor(
                dtype_of(row["dtype"]), _shape(row["shape"]), None if original is None else _shape(original)
            )
            tensor.chunks = [
                Chunk(Box(_shape(c["offsets"]), _shape(c["sizes"])), _place(c["place"])) for c in row["chunks"]
            ]
            catalog.tensors[key] = tensor
    except FileNotFoundError:
        raise CheckpointingException(f"{path} is missing: the checkpoint is incomplete") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointingException(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return catalog


def _shape(sizes: Any) -> Shape:
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    return tuple(sizes)


def _place(row: Any) -> Place:
    file, offset, length = row
    inside = isinstance(file, str) and not Path(file).is_absolute() and ".." not in Path(file).parts
    if not inside or not all(isinstance(n, int) and n >= 0 for n in (offset, length)):
        raise ValueError(f"{row!r} is no place in a file of the checkpoint")
    return Place(file, offset, length)


def open_chunk(data: memoryview, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """The bytes as a tensor."""
    numel = torch.Size(shape).numel()
    if len(data) != numel * dtype.itemsize:
        raise CheckpointingException(f"{len(data)} bytes for {numel} elements of {dtype}")
    return torch.frombuffer(data, dtype=dtype, count=numel).reshape(shape)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header of a safetensors file, where its data begins)."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MOST_HEADER:
                raise CheckpointingException(f"{path} claims a header of {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("no header")
    except (struct.error, ValueError) as error:
        raise CheckpointingException(f"{path} is not a safetensors file ({error})") from error
    return header, 8 + length


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file, in memory of its own."""
    header, start = read_header(path)
    try:
        row = header[name]
        first, last = row["data_offsets"]
        dtype, shape = dtype_of(row["dtype"]), _shape(row["shape"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointingException(f"{path} has no tensor {name!r} ({error})") from error
    size = path.stat().st_size - start
    if not 0 <= first <= last <= size:
        raise CheckpointingException(f"{path}: {name} lies at {first} to {last} of {size} bytes")
    data = bytearray(read_bytes(Place(path.name, start + first, last - first), path.parent))
    return open_chunk(memoryview(data), dtype, shape) if data else torch.empty(shape, dtype=dtype)


class SafetensorsLoadShardedStrategy(ShardedFilesLoadStrategy):
    """Reads what `SafetensorsSaveShardedStrategy` has written."""

    backend = "safetensors"

    def read_catalog(self, directory: Path) -> Catalog:
        return read_index(directory)

    def open_chunk(self, data: memoryview, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
        return open_chunk(data, dtype, shape)

    def read_objects(self, objects: Iterable[ShardedObject], catalog: Catalog, directory: Path) -> dict[str, Any]:
        found = {}
        for key in {o.unique_key for o in objects}:
            place = catalog.objects[key]
            path = directory / place.file
            text = _parse(read_bytes(place, directory), f"{key} in {path}")
            found[key] = decode(text, partial(read_tensor, path))
        return found


def _parse(text: bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointingException(f"{name} is not JSON ({error})") from error


# ---- the common state ----


class JsonCommonSaveStrategy(SaveCommonStrategy):
    """Writes `common.json`."""

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord]:
        return write_together(lambda: self.plan_common(common_state_dict), Path(checkpoint_dir))

    def plan_common(self, common_state_dict: StateDict) -> list[FilePlan]:
        if rank_and_size()[0] != 0:
            return []
        text = json.dumps(encode(common_state_dict, inline_tensor), allow_nan=False, indent=1)
        return [FilePlan(COMMON_JSON_FNAME, [text.encode()])]

    def own_files(self, directory: Path) -> list[Path]:
        return [directory / COMMON_JSON_FNAME]


class JsonCommonLoadStrategy(LoadCommonStrategy):
    """Reads `common.json`."""

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        path = Path(checkpoint_dir) / COMMON_JSON_FNAME
        try:
            state = decode(_parse(path.read_bytes(), str(path)), outline_tensor)
        except FileNotFoundError:
            raise CheckpointingException(f"{path} is missing: the checkpoint is incomplete") from None
        if not isinstance(state, dict):
            raise CheckpointingException(f"{path} holds a {type(state).__name__}, expected a state dict")
        return state


for _action, _backend, _strategy in (
    (StrategyAction.SAVE_SHARDED, "safetensors", SafetensorsSaveShardedStrategy("safetensors", 1)),
    (StrategyAction.LOAD_SHARDED, "safetensors", SafetensorsLoadShardedStrategy()),
    (StrategyAction.SAVE_COMMON, "json", JsonCommonSaveStrategy("json", 1)),
    (StrategyAction.LOAD_COMMON, "json", JsonCommonLoadStrategy()),
):
    register_default_strategy(_action, _backend, 1, _strategy)
