"""Reading the token sequences of `<prefix>.bin` and `<prefix>.idx`; `index_file` describes the format."""

from __future__ import annotations

import os
from mmap import mmap as MemoryMap
from typing import Any

import numpy
import torch

from megatron.core.datasets.index_file import DType, Index, get_bin_path, get_idx_path, map_file
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder", "get_bin_path", "get_idx_path"]


class IndexedDataset(torch.utils.data.Dataset):
    """The sequences of `<path_prefix>.bin` and `<path_prefix>.idx`, read on demand.

    Both files are checked when they are opened, so that a truncated or foreign file cannot pass for data.

    Args:
        path_prefix: path of both files without their suffix.
        multimodal: the index also holds a mode for each sequence; items are then (tokens, mode).
        mmap: read tokens from a memory map; otherwise by one plain read an item.
        object_storage_config, s3_config: not built yet.
    """

    def __init__(
        self,
        path_prefix: str,
        multimodal: bool = False,
        mmap: bool = True,
        object_storage_config: Any = None,
        s3_config: Any = None,
    ) -> None:
        super().__init__()
        self.initialize(path_prefix, multimodal, mmap, object_storage_config or s3_config)

    def initialize(self, path_prefix: str, multimodal: bool, mmap: bool, object_storage_config: Any) -> None:
        """Open the files; also what unpickling calls."""
        if object_storage_config is not None or path_prefix.startswith(("s3://", "msc://")):
            raise NotImplementedError(f"reading a dataset from object storage ({path_prefix}) is not built yet")
        self.path_prefix = path_prefix
        self.multimodal = multimodal
        self.mmap = mmap
        self._bin_path = get_bin_path(path_prefix)
        _require_files(path_prefix)
        self.index = Index(get_idx_path(path_prefix), multimodal)
        self._dtype = numpy.dtype(self.index.dtype)
        self._require_bin_size()
        self._buffer: MemoryMap | None = None
        if mmap and self.index.num_bin_bytes:
            self._buffer = map_file(self._bin_path)

    def _require_bin_size(self) -> None:
        found, expected = os.path.getsize(self._bin_path), self.index.num_bin_bytes
        if found != expected:
            state = "is truncated" if found < expected else "does not belong to its index"
            raise ValueError(
                f"{self._bin_path} {state}: it has {found} bytes, the sequences of {self.index.path} need {expected}"
            )

    def __getstate__(self) -> tuple[str, bool, bool, None]:
        return self.path_prefix, self.multimodal, self.mmap, None

    def __setstate__(self, state: tuple[str, bool, bool, None]) -> None:
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
        target, done = memoryview(tokens.view(numpy.uint8).data), 0
        with open(self._bin_path, "rb", buffering=0) as file:
            file.seek(position)
            while done < len(target):
                num_read = file.readinto(target[done:])
                if not num_read:
                    raise RuntimeError(f"{self._bin_path} ended at byte {position + done} while it was read")
                done += num_read
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
        return os.path.exists(get_idx_path(path_prefix)) and os.path.exists(get_bin_path(path_prefix))


def _require_files(path_prefix: str) -> None:
    missing = [path for path in (get_bin_path(path_prefix), get_idx_path(path_prefix)) if not os.path.isfile(path)]
    if missing:
        hint = ""
        if path_prefix.endswith((".bin", ".idx")) and IndexedDataset.exists(path_prefix[:-4]):
            hint = f"; give the path without its suffix: {path_prefix[:-4]}"
        raise FileNotFoundError(f"dataset {path_prefix}: no file {' and no file '.join(missing)}{hint}")
