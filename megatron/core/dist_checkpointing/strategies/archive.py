"""The archive that `torch.save` makes of one tensor, laid out and read back without torch's reader.

It is a zip file without compression: `archive/data.pkl` describes the tensor, `archive/data/0` are its bytes. Knowing
this, a tensor can be written straight from its memory between a head and a tail of a few hundred bytes, and read
straight from a mapped file, once and into place. The checksums of the zip format itself are zero, as those of
`torch.save` are with `torch.serialization.set_crc32_options(False)`: the manifest has better ones.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import torch

from ..core import CheckpointingException
from .resharding import Shape, row_major_strides

ALIGNMENT = 64
"""Tensor bytes start at multiples of this in their file."""
_ROOT = "archive/"
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_PADDING_ID = 0x4246  # the extra field that torch pads with, too
_ZIP64_LIMIT = 0xFFFFFFFF
_MAX_DESCRIPTION = 1 << 20


# ---- writing ----


def frame(dtype: torch.dtype, shape: Shape, offset: int) -> tuple[bytes, bytes] | None:
    """(head, tail) that make an archive of a contiguous tensor's bytes between them; None for a type of tensor that
    only torch can write.

    Args:
        offset: where in its file the archive will begin.
    """
    description = _describe(dtype, shape)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if description is None:
        return None
    head, central = b"", b""
    for name, content in (("data.pkl", description), ("byteorder", b"little"), ("version", b"3\n")):
        central += _central_header(name, len(content), crc32(content), len(head))
        head += _local_header(name, len(content), crc32(content)) + content
    central += _central_header("data/0", num_bytes, 0, len(head))
    unpadded = len(_local_header("data/0", num_bytes, 0, padding=0))
    padding = -(offset + len(head) + unpadded) % ALIGNMENT
    head += _local_header("data/0", num_bytes, 0, padding=padding)
    return head, central + _end_of_central(4, len(central), len(head) + num_bytes)


@lru_cache(maxsize=4096)
def _describe(dtype: torch.dtype, shape: Shape) -> bytes | None:
    """`data.pkl` of a contiguous CPU tensor."""
    storage = _storage_class(dtype)
    if storage is None:
        return None
    file = io.BytesIO()
    _DescriptionPickler(file, _Description(storage, tuple(shape))).dump_description()
    return file.getvalue()


@dataclass(frozen=True)
class _Description:
    storage: type
    shape: Shape


class _StandIn:
    """Takes the place of the storage, which is pickled as a reference to `data/0`."""


class _DescriptionPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, description: _Description) -> None:
        super().__init__(file, protocol=2)
        self.description = description

    def dump_description(self) -> None:
        self.dump(self.description)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StandIn):
            return None
        numel = torch.Size(self.description.shape).numel()
        return "storage", self.description.storage, "0", "cpu", numel

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Description):
            return NotImplemented
        shape = obj.shape
        return torch._utils._rebuild_tensor_v2, (_StandIn(), 0, shape, row_major_strides(shape), False, OrderedDict())


def _storage_class(dtype: torch.dtype) -> type | None:
    """Class that stands for a type in a pickle, such as `torch.FloatStorage`; None if there is none."""
    name = torch.storage._dtype_to_storage_type_map().get(dtype)
    return getattr(torch, name, None) if name else None


def _zip64(*sizes: int) -> bytes:
    return struct.pack("<HH", 1, 8 * len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)


def _local_header(name: str, size: int, crc: int, padding: int | None = None) -> bytes:
    path = (_ROOT + name).encode()
    extra = _zip64(size, size) if size >= _ZIP64_LIMIT else b""
    if padding is not None:
        extra += struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    shown = min(size, _ZIP64_LIMIT)
    fields = (45 if size >= _ZIP64_LIMIT else 20, 0, 0, 0, 0, crc, shown, shown, len(path), len(extra))
    return _LOCAL + struct.pack("<HHHHHIIIHH", *fields) + path + extra


def _central_header(name: str, size: int, crc: int, offset: int) -> bytes:
    path = (_ROOT + name).encode()
    extra = _zip64(size, size) if size >= _ZIP64_LIMIT else b""
    shown, version = min(size, _ZIP64_LIMIT), 45 if size >= _ZIP64_LIMIT else 20
    sizes = (crc, shown, shown, len(path), len(extra), 0, 0, 0, 0, offset)
    return _CENTRAL + struct.pack("<HHHHHHIIIHHHHHII", version, version, 0, 0, 0, 0, *sizes) + path + extra


def _end_of_central(count: int, size: int, offset: int) -> bytes:
    """End of an archive whose central directory of `size` bytes begins at `offset`."""
    zip64 = b""
    if offset >= _ZIP64_LIMIT:
        record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        zip64 = record + struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
    return zip64 + _END + struct.pack("<HHHHIIH", 0, 0, count, count, size, min(offset, _ZIP64_LIMIT), 0)


# ---- reading ----


@dataclass(frozen=True)
class StorageReference:
    """What a file's description says about the bytes of a tensor."""

    dtype: torch.dtype
    name: str
    numel: int


@dataclass(frozen=True)
class TensorDescription:
    """A strided view of a storage."""

    storage: StorageReference
    offset: int
    shape: Shape
    strides: Shape


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads the description of one tensor, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        path = f"{module_name}.{global_name}"
        if path == "torch._utils._rebuild_tensor_v2":
            return _rebuild_description
        if path == "collections.OrderedDict":
            return OrderedDict
        dtype = _storage_dtypes().get(path)
        if dtype is None:
            raise pickle.UnpicklingError(f"{path} is not part of a tensor's description")
        return dtype

    def persistent_load(self, pid: Any) -> StorageReference:
        kind, dtype, name, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(name, str):
            raise pickle.UnpicklingError("not a reference to a storage")
        return StorageReference(dtype, name, int(numel))


@lru_cache(maxsize=1)
def _storage_dtypes() -> dict[str, torch.dtype]:
    return {f"torch.{name}": dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}


def _rebuild_description(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorDescription:
    numbers = (offset, *shape, *strides)
    plain = isinstance(storage, StorageReference) and all(isinstance(n, int) and n >= 0 for n in numbers)
    if not plain or len(shape) != len(strides):
        raise pickle.UnpicklingError("not the description of a tensor")
    return TensorDescription(storage, offset, tuple(shape), tuple(strides))


def read_tensor(data: memoryview) -> torch.Tensor:
    """The tensor of an archive, as a view of `data`.

    Args:
        data: the archive's bytes, in memory that may be written to (nothing is written).

    Raises:
        CheckpointingException: the bytes are not such an archive, or contradict themselves.
    """
    try:
        with zipfile.ZipFile(_View(data)) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            info = members["data.pkl"]
            if info.file_size > min(_MAX_DESCRIPTION, len(data)):
                raise CheckpointingException(f"its description claims {info.file_size} bytes")
            description = _DescriptionUnpickler(io.BytesIO(archive.read(info))).load()
            if members.get("byteorder") and archive.read(members["byteorder"]) != b"little":
                raise CheckpointingException("its bytes are in big-endian order")
        if not isinstance(description, TensorDescription):
            raise CheckpointingException("it does not hold a tensor")
        return _view_of(description, _stored_bytes(members[f"data/{description.storage.name}"], data))
    except CheckpointingException:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointingException(f"it is not the archive of a tensor ({reason})") from error


class _View(io.RawIOBase):
    """A memoryview as a file, without a copy of its own."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _stored_bytes(info: zipfile.ZipInfo, data: memoryview) -> memoryview:
    """The bytes of a member, which must not be compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointingException(f"{info.filename} is compressed, which torch never does")
    name_length, extra_length = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(data):
        raise CheckpointingException(f"{info.filename} claims more bytes than there are")
    return data[start : start + info.file_size]


def _view_of(description: TensorDescription, stored: memoryview) -> torch.Tensor:
    dtype, shape, strides = description.storage.dtype, description.shape, description.strides
    numel = len(stored) // dtype.itemsize
    if torch.Size(shape).numel() == 0:
        return torch.empty(shape, dtype=dtype)
    last = description.offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if last >= numel:
        raise CheckpointingException(f"it has {numel} elements, its description speaks of {last + 1}")
    return torch.frombuffer(stored, dtype=dtype, count=numel).as_strided(shape, strides, description.offset)
