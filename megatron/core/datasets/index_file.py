"""Token sequences on disk: `<prefix>.bin` holds the tokens, `<prefix>.idx` says where each sequence lies.

The `.idx` file, little-endian: magic (9 bytes), version (u64), dtype code (u8), number of sequences S (u64),
length D of the document array (u64), lengths (S x i32, in tokens), pointers (S x i64, bytes into `.bin`),
document indices (D x i64, the sequences at which documents start, ending with S), and for multimodal data
modes (S x i8).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import numpy

from megatron.core.datasets.spilled_array import SpilledArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
_BYTES_PER_SEQUENCE = 4 + 8
_CHECK_ROWS = 1 << 20  # rows checked at a time, so that checking needs little memory


class DType(Enum):
    """Number formats of a `.bin` file and their codes in the `.idx` file."""

    uint8 = 1
    int8 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float64 = 6
    float32 = 7
    uint16 = 8

    @classmethod
    def code_from_dtype(cls, value: type[numpy.number]) -> int:
        """Code of a numpy number type."""
        name = numpy.dtype(value).name
        if name not in cls.__members__:
            raise ValueError(f"dtype {name} cannot be stored, choose one of {', '.join(cls.__members__)}")
        return cls[name].value

    @classmethod
    def dtype_from_code(cls, value: int) -> type[numpy.number]:
        """Numpy number type of a code."""
        return getattr(numpy, cls(value).name)

    @staticmethod
    def size(key: int | type[numpy.number]) -> int:
        """Bytes of one number, given its code or its type."""
        dtype = DType.dtype_from_code(key) if isinstance(key, int) else key
        return numpy.dtype(dtype).itemsize

    @staticmethod
    def optimal_dtype(cardinality: int | None) -> type[numpy.number]:
        """The type in which ids below `cardinality` are stored: uint16 below 65500, otherwise int32."""
        return numpy.uint16 if cardinality is not None and cardinality < 65500 else numpy.int32


def get_idx_path(path_prefix: str) -> str:
    """Path of the index file."""
    return path_prefix + ".idx"


def get_bin_path(path_prefix: str) -> str:
    """Path of the token file."""
    return path_prefix + ".bin"


class Index:
    """The arrays of an `.idx` file, memory-mapped and checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a complete and consistent index; the message says what is wrong.
    """

    def __init__(self, idx_path: str, multimodal: bool) -> None:
        self.path = idx_path
        num_bytes = os.path.getsize(idx_path)
        with open(idx_path, "rb") as file:
            header = file.read(HEADER.size)
        self.dtype, self.sequence_count, self.document_count = self._read_header(header, num_bytes)
        self._require_size(num_bytes, multimodal)

        self._buffer = map_file(idx_path)
        start = HEADER.size
        arrays = []
        for dtype, count in (
            ("<i4", self.sequence_count),
            ("<i8", self.sequence_count),
            ("<i8", self.document_count),
        ):
            arrays.append(numpy.frombuffer(self._buffer, dtype=dtype, count=count, offset=start))
            start += arrays[-1].nbytes
        self.sequence_lengths, self.sequence_pointers, self.document_indices = arrays
        self.sequence_modes: numpy.ndarray | None = None
        if multimodal:
            self.sequence_modes = numpy.frombuffer(self._buffer, numpy.int8, self.sequence_count, start)
        self.num_bin_bytes = self._check_sequences()
        self._check_documents()

    def _read_header(self, header: bytes, num_bytes: int) -> tuple[type[numpy.number], int, int]:
        if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
            raise ValueError(f"{self.path} is not an index file: it starts with {header[:9]!r}, expected {MAGIC!r}")
        if len(header) < HEADER.size:
            raise ValueError(f"{self.path} is truncated: {num_bytes} bytes, the header alone has {HEADER.size}")
        _, version, code, sequence_count, document_count = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{self.path} has format version {version}, only version {VERSION} can be read")
        if code not in {member.value for member in DType}:
            known = ", ".join(f"{member.value} {member.name}" for member in DType)
            raise ValueError(f"{self.path} has the unknown dtype code {code} (known: {known})")
        return DType.dtype_from_code(code), sequence_count, document_count

    def _require_size(self, num_bytes: int, multimodal: bool) -> None:
        plain = HEADER.size + _BYTES_PER_SEQUENCE * self.sequence_count + 8 * self.document_count
        expected = plain + (self.sequence_count if multimodal else 0)
        if num_bytes == expected:
            return
        if multimodal and num_bytes == plain:
            raise ValueError(f"{self.path} holds no sequence modes: open it with multimodal=False")
        if not multimodal and num_bytes == plain + self.sequence_count:
            raise ValueError(f"{self.path} holds a mode for each sequence: open it with multimodal=True")
        state = "truncated" if num_bytes < expected else "damaged or of another format"
        raise ValueError(
            f"{self.path} is {state}: it has {num_bytes} bytes, but {self.sequence_count} sequences and "
            f"{self.document_count} document indices need {expected}"
        )

    def _check_sequences(self) -> int:
        """Total bytes of the sequences, after checking that each starts where the one before it ends."""
        itemsize = DType.size(self.dtype)
        position = 0
        for begin in range(0, self.sequence_count, _CHECK_ROWS):
            lengths = self.sequence_lengths[begin : begin + _CHECK_ROWS].astype(numpy.int64)
            pointers = self.sequence_pointers[begin : begin + _CHECK_ROWS]
            if lengths.min() < 0:
                bad = int(numpy.argmax(lengths < 0))
                raise ValueError(f"{self.path}: sequence {begin + bad} has the negative length {lengths[bad]}")
            ends = position + numpy.cumsum(lengths * itemsize)
            starts = ends - lengths * itemsize
            if not numpy.array_equal(starts, pointers):
                bad = int(numpy.argmax(starts != pointers))
                raise ValueError(
                    f"{self.path}: sequence {begin + bad} points to byte {pointers[bad]}, but the lengths "
                    f"before it add up to byte {starts[bad]}"
                )
            position = int(ends[-1])
            self.release_memory()
        return position

    def release_memory(self) -> None:
        """Count the pages read so far as free again; those that are read once more come from the page cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._buffer.madvise(mmap.MADV_DONTNEED)

    def _check_documents(self) -> None:
        indices = self.document_indices
        if len(indices) == 0 or indices[0] != 0:
            first = f"starts with {indices[0]}" if len(indices) else "is empty"
            raise ValueError(f"{self.path}: the document index {first}, it must start with 0")
        for begin in range(0, len(indices) - 1, _CHECK_ROWS):
            steps = numpy.diff(indices[begin : begin + _CHECK_ROWS + 1])
            if steps.min() < 0:
                bad = begin + int(numpy.argmax(steps < 0))
                raise ValueError(
                    f"{self.path}: the document index falls from {indices[bad]} to {indices[bad + 1]} at "
                    f"entry {bad + 1}"
                )
        if indices[-1] != self.sequence_count:
            raise ValueError(
                f"{self.path}: the document index ends with {indices[-1]}, it must end with the number of "
                f"sequences, {self.sequence_count}"
            )


def map_file(path: str) -> mmap.mmap:
    """The bytes of a file that is not empty, mapped into memory for reading."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Gives errors of writing, such as a full disk, the path that they lack."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, path) from None
        raise


def write_index(
    path: str,
    dtype: type[numpy.number],
    sequence_lengths: SpilledArray,
    document_indices: SpilledArray,
    sequence_modes: SpilledArray | None,
) -> None:
    """Write an index file of sequences without gaps between them, and wait until it is on the disk."""
    with naming(path), open(path, "wb") as file:
        code = DType.code_from_dtype(dtype)
        file.write(HEADER.pack(MAGIC, VERSION, code, len(sequence_lengths), len(document_indices)))
        for lengths in sequence_lengths.chunks():
            file.write(lengths.astype("<i4").data)
        position = 0
        for lengths in sequence_lengths.chunks():
            ends = position + numpy.cumsum(lengths, dtype=numpy.int64) * DType.size(dtype)
            pointers = numpy.concatenate([[position], ends[:-1]])
            file.write(pointers.astype("<i8").data)
            position = int(ends[-1])
        for indices in document_indices.chunks():
            file.write(indices.astype("<i8").data)
        for modes in sequence_modes.chunks() if sequence_modes is not None else ():
            file.write(modes.data)
        file.flush()
        os.fsync(file.fileno())
