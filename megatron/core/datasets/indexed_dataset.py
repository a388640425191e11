"""Reading the token sequences of `<prefix>.bin` and `<prefix>.idx`; `index_file` describes the format."""

from __future__ import annotations

import os
from mmap import mmap as MemoryMap
from typing import Any

import numpy
import torch

from megatron.core.datasets.index_file import DType, Index, get_bin_path, get_idx_path, map_file
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.core.datasets.object_storage_utils import (
    ObjectStorageConfig,
    RemoteTokens,
    S3Config,
    fetch_index,
    is_object_storage_path,
    storage_of,
)

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder", "get_bin_path", "get_idx_path"]


class IndexedDataset(torch.utils.data.Dataset):
    """The sequences of `<path_prefix>.bin` and `<path_prefix>.idx`, read on demand.

    Both files are checked when they are opened, so that a truncated or foreign file cannot pass for data.

    Args:
        path_prefix: path of both files without their suffix.
        multimodal: the index also holds a mode for each sequence; items are then (tokens, mode).
        mmap: read tokens from a memory map; otherwise by one plain read an item.
        object_storage_config: for a path in object storage (`s3://`, `msc://`), where its index is kept; the tokens
            are then fetched in pieces, whatever `mmap` says. `s3_config` is an older name of it.
    """

    def __init__(
        self,
        path_prefix: str,
        multimodal: bool = False,
        mmap: bool = True,
        object_storage_config: ObjectStorageConfig | None = None,
        s3_config: S3Config | None = None,
    ) -> None:
        super().__init__()
        self.initialize(path_prefix, multimodal, mmap, object_storage_config or s3_config)

    def initialize(
        self, path_prefix: str, multimodal: bool, mmap: bool, object_storage_config: ObjectStorageConfig | None
    ) -> None:
        """Open the files; also what unpickling calls."""
        self.path_prefix = path_prefix
        self.multimodal = multimodal
        self.mmap = mmap
        self.object_storage_config = object_storage_config
        bin_path = get_bin_path(path_prefix)
        self._tokens: RemoteTokens | LocalTokens
        if is_object_storage_path(path_prefix):
            config = _required_config(path_prefix, object_storage_config)
            self._tokens = RemoteTokens(bin_path, config.bin_chunk_nbytes)
            num_bytes, idx_path = self._tokens.file.num_bytes, fetch_index(get_idx_path(path_prefix), config)
        else:
            _require_files(path_prefix)
            self._tokens, num_bytes, idx_path = LocalTokens(bin_path), os.path.getsize(bin_path), f"{path_prefix}.idx"
        self.index = Index(idx_path, multimodal)
        self._dtype = numpy.dtype(self.index.dtype)
        _require_bin_size(bin_path, num_bytes, self.index)
        self._buffer: MemoryMap | None = None
        if mmap and self.index.num_bin_bytes and isinstance(self._tokens, LocalTokens):
            self._buffer = map_file(bin_path)

    @property
    def local_prefix(self) -> str:
        """Path of the index file without its suffix: `path_prefix`, or that of the copy of a file in object storage."""
        return self.index.path.removesuffix(".idx")

    def __getstate__(self) -> tuple[str, bool, bool, ObjectStorageConfig | None]:
        return self.path_prefix, self.multimodal, self.mmap, self.object_storage_config

    def __setstate__(self, state: tuple[str, bool, bool, ObjectStorageConfig | None]) -> None:
        self.initialize(*state)

    def __len__(self) -> int:
        return self.index.sequence_count

    def __getitem__(self, idx: int | numpy.integer | slice) -> Any:
        """One sequence, or the list of those in a slice without a step; with modes, pairs (tokens, modes)."""
        if not isinstance(idx, slice):
            return self.get(int(idx))
        start, stop, step = idx.indices(len(self))
        if step != 1:
            raise ValueError(f"sequences can only be sliced with step 1, got {idx}")
        lengths = self.index.sequence_lengths[start:stop]
        if len(lengths) == 0:
            sequences = []
        else:
            tokens = self._read(int(self.index.sequence_pointers[start]), int(lengths.sum(dtype=numpy.int64)))
            sequences = numpy.split(tokens, numpy.cumsum(lengths[:-1], dtype=numpy.int64))
        if self.index.sequence_modes is None:
            return sequences
        return sequences, self.index.sequence_modes[start:stop]

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Any:
        """`length` tokens of a sequence from token `offset` on (None: up to its end), and its mode if any."""
        available = int(self.index.sequence_lengths[idx])
        if length is None:
            length = available - offset
        if offset < 0 or length < 0 or offset + length > available:
            raise ValueError(
                f"{self.path_prefix}: tokens {offset} to {offset + length} asked of sequence {idx}, which "
                f"has {available}"
            )
        tokens = self._read(int(self.index.sequence_pointers[idx]) + offset * self._dtype.itemsize, length)
        return tokens if self.index.sequence_modes is None else (tokens, self.index.sequence_modes[idx])

    def _read(self, position: int, count: int) -> numpy.ndarray:
        """`count` tokens from byte `position` on."""
        if self._buffer is not None:
            return numpy.frombuffer(self._buffer, self._dtype, count, position)
        tokens = numpy.empty(count, self._dtype)
        if count:
            self._tokens.read_into(position, memoryview(tokens.view(numpy.uint8).data))
        return tokens

    @property
    def sequence_lengths(self) -> numpy.ndarray:
        """[S] int32, tokens of each sequence."""
        return self.index.sequence_lengths

    @property
    def document_indices(self) -> numpy.ndarray:
        """[number of documents + 1] int64, the sequences at which documents start."""
        return self.index.document_indices

    def get_document_indices(self) -> numpy.ndarray:
        """The same as `document_indices`."""
        return self.index.document_indices

    def set_document_indices(self, document_indices: numpy.ndarray) -> None:
        """Replace the document indices of this object (the file stays as it is)."""
        self.index.document_indices = document_indices

    @property
    def sequence_modes(self) -> numpy.ndarray | None:
        """[S] int8, or None for data without modes."""
        return self.index.sequence_modes

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """Whether both files of a dataset are there."""
        if is_object_storage_path(path_prefix):
            try:
                for path in (get_idx_path(path_prefix), get_bin_path(path_prefix)):
                    storage_of(path).find(path)
            except FileNotFoundError:
                return False
            return True
        return os.path.exists(get_idx_path(path_prefix)) and os.path.exists(get_bin_path(path_prefix))


class LocalTokens:
    """The bytes of a `.bin` file, by one plain read at a time."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `position` on."""
        done = 0
        with open(self._path, "rb", buffering=0) as file:
            file.seek(position)
            while done < len(target):
                num_read = file.readinto(target[done:])
                if not num_read:
                    raise RuntimeError(f"{self._path} ended at byte {position + done} while it was read")
                done += num_read


def _required_config(path_prefix: str, config: ObjectStorageConfig | None) -> ObjectStorageConfig:
    if config is None:
        raise ValueError(
            f"{path_prefix} lies in object storage: its index needs a local folder, object_storage_config "
            "(--object-storage-cache-path)"
        )
    return config


def _require_bin_size(bin_path: str, num_bytes: int, index: Index) -> None:
    if num_bytes != index.num_bin_bytes:
        state = "is truncated" if num_bytes < index.num_bin_bytes else "does not belong to its index"
        raise ValueError(
            f"{bin_path} {state}: it has {num_bytes} bytes, the sequences of {index.path} need {index.num_bin_bytes}"
        )


def _require_files(path_prefix: str) -> None:
    missing = [path for path in (get_bin_path(path_prefix), get_idx_path(path_prefix)) if not os.path.isfile(path)]
    if missing:
        hint = ""
        if path_prefix.endswith((".bin", ".idx")) and IndexedDataset.exists(path_prefix[:-4]):
            hint = f"; give the path without its suffix: {path_prefix[:-4]}"
        raise FileNotFoundError(f"dataset {path_prefix}: no file {' and no file '.join(missing)}{hint}")
