"""Writing `<prefix>.bin` and `<prefix>.idx`; the format is described in `index_file`."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy

from megatron.core.datasets.index_file import DType, Index, get_bin_path, get_idx_path, naming, write_index
from megatron.core.datasets.spilled_array import SpilledArray

if TYPE_CHECKING:  # preparing data starts without torch
    import torch

PARTIAL = ".partial"
"""Suffix of files that are still being written; a killed writer leaves only these behind."""

_COPIED_ROWS, _COPIED_BYTES = 1 << 18, 1 << 22
_LOCK_PATIENCE = 3.0  # seconds; processes that a killed writer had started may outlive it by a second


class IndexedDatasetBuilder:
    """Appends sequences and documents; `finalize` publishes the two files under their names.

    Until then everything lies in `<bin_path>.partial`: a dataset that exists is complete. As a context
    manager the builder removes what it wrote when the block raises.

    Args:
        bin_path: path of the token file.
        dtype: number type of the tokens.
        multimodal: also store a mode for each sequence.
    """

    def __init__(self, bin_path: str, dtype: type[numpy.number] = numpy.int32, multimodal: bool = False) -> None:
        DType.code_from_dtype(dtype)  # refuses types that cannot be stored
        self.bin_path = bin_path
        self.dtype = dtype
        self.multimodal = multimodal
        self._file = _open_for_writing(bin_path + PARTIAL)
        self._idx_path: str | None = None
        folder = os.path.dirname(bin_path) or "."
        self._sequence_lengths = SpilledArray("i", folder)
        self._sequence_modes = SpilledArray("b", folder)
        self._document_indices = SpilledArray("q", folder)
        self._document_indices.append(0)

    @property
    def num_sequences(self) -> int:
        """Sequences appended so far."""
        return len(self._sequence_lengths)

    def add_item(self, tensor: torch.Tensor | numpy.ndarray, mode: int = 0) -> None:
        """Append one sequence to the open document."""
        tokens = self._stored(tensor)
        with naming(self.bin_path):
            self._file.write(tokens.data)
        self._append_sequences([tokens.size], [mode])

    def end_document(self) -> None:
        """Close the open document; one without sequences counts too."""
        self._document_indices.append(self.num_sequences)

    def add_document(
        self, tensor: torch.Tensor | numpy.ndarray, lengths: list[int], modes: list[int] | None = None
    ) -> None:
        """Append a whole document: `tensor` is all of its sequences in a row, `lengths` their lengths."""
        self.add_documents(tensor, lengths, [len(lengths)], modes)

    def add_documents(
        self,
        tensor: torch.Tensor | numpy.ndarray,
        lengths: numpy.ndarray | list[int],
        sequence_counts: numpy.ndarray | list[int],
        modes: numpy.ndarray | list[int] | None = None,
    ) -> None:
        """Append several documents; `sequence_counts` says how many of the `lengths` belong to each."""
        tokens = self._stored(tensor)
        self._check_counts(tokens.size, lengths, sequence_counts, modes)
        with naming(self.bin_path):
            self._file.write(tokens.data)
        self._append_documents(lengths, sequence_counts, modes)

    def add_documents_of_file(
        self,
        path: str,
        lengths: numpy.ndarray | list[int],
        sequence_counts: numpy.ndarray | list[int],
        modes: numpy.ndarray | list[int] | None = None,
    ) -> None:
        """As `add_documents`, with tokens that lie in a file, in the type of this dataset."""
        self._check_counts(os.path.getsize(path) // DType.size(self.dtype), lengths, sequence_counts, modes)
        self._copy(path)
        self._append_documents(lengths, sequence_counts, modes)

    def add_index(self, path_prefix: str) -> None:
        """Append all documents of another dataset of the same dtype, in bounded memory."""
        index = Index(get_idx_path(path_prefix), self.multimodal)
        if index.dtype != self.dtype:
            raise ValueError(
                f"{path_prefix} stores {index.dtype.__name__}, it cannot be appended to {self.bin_path}, "
                f"which stores {self.dtype.__name__}"
            )
        bin_bytes = os.path.getsize(get_bin_path(path_prefix))
        if bin_bytes != index.num_bin_bytes:
            raise ValueError(
                f"{get_bin_path(path_prefix)} has {bin_bytes} bytes, the sequences of {index.path} need "
                f"{index.num_bin_bytes}"
            )
        first = self.num_sequences
        for rows in _pieces_of(index.sequence_lengths, index):
            self._sequence_lengths.extend(rows)
        for rows in _pieces_of(index.document_indices[1:], index):
            self._document_indices.extend(rows + first)
        for rows in () if index.sequence_modes is None else _pieces_of(index.sequence_modes, index):
            self._sequence_modes.extend(rows)
        self._copy(get_bin_path(path_prefix))

    def _copy(self, path: str) -> None:
        with open(path, "rb") as source, naming(self.bin_path):
            shutil.copyfileobj(source, self._file, _COPIED_BYTES)

    def finalize(self, idx_path: str) -> None:
        """Publish the dataset under its names."""
        self.complete(idx_path)
        self.publish()

    def complete(self, idx_path: str) -> None:
        """Write all that is left to write, still under temporary names: what can fail, fails here."""
        self._idx_path = idx_path
        modes = self._sequence_modes if self.multimodal else None
        write_index(idx_path + PARTIAL, self.dtype, self._sequence_lengths, self._document_indices, modes)
        with naming(self.bin_path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give both files their names: the token file first, the index last, an old index away before either.

        So at no time do a new and an old file stand together as one dataset.
        """
        assert self._idx_path is not None
        Path(self._idx_path).unlink(missing_ok=True)
        os.replace(self.bin_path + PARTIAL, self.bin_path)
        os.replace(self._idx_path + PARTIAL, self._idx_path)
        self._file.close()

    def abort(self) -> None:
        """Remove what was written, unless it is published; files of an earlier dataset stay as they are."""
        if self._file.closed:
            return
        Path(self.bin_path + PARTIAL).unlink(missing_ok=True)
        if self._idx_path is not None:
            Path(self._idx_path + PARTIAL).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk: the file is gone already
            self._file.close()

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _check_counts(
        self,
        num_tokens: int,
        lengths: numpy.ndarray | list[int],
        sequence_counts: numpy.ndarray | list[int],
        modes: numpy.ndarray | list[int] | None,
    ) -> None:
        num_modes = len(lengths) if modes is None else len(modes)
        length_sum, count_sum = int(numpy.sum(lengths)), int(numpy.sum(sequence_counts))
        if length_sum != num_tokens or count_sum != len(lengths) or num_modes != len(lengths):
            raise ValueError(
                f"{num_tokens} tokens, {len(lengths)} lengths that sum to {length_sum}, {num_modes} "
                f"modes and documents of {count_sum} sequences do not fit together"
            )

    def _append_documents(
        self,
        lengths: numpy.ndarray | list[int],
        sequence_counts: numpy.ndarray | list[int],
        modes: numpy.ndarray | list[int] | None,
    ) -> None:
        first = self.num_sequences
        self._append_sequences(lengths, [0] * len(lengths) if modes is None else modes)
        self._document_indices.extend(first + numpy.cumsum(sequence_counts, dtype=numpy.int64))

    def _append_sequences(self, lengths: numpy.ndarray | list[int], modes: numpy.ndarray | list[int]) -> None:
        self._sequence_lengths.extend(lengths)
        if self.multimodal:
            self._sequence_modes.extend(modes)

    def _stored(self, tensor: torch.Tensor | numpy.ndarray) -> numpy.ndarray:
        """The tokens in the type of the file, contiguous; refuses values that do not fit into it."""
        tokens = numpy.asarray(tensor)
        if tokens.dtype == self.dtype:
            return numpy.ascontiguousarray(tokens)
        if tokens.size and numpy.issubdtype(self.dtype, numpy.integer):
            limits = numpy.iinfo(numpy.dtype(self.dtype))
            low, high = tokens.min(), tokens.max()
            if low < limits.min or high > limits.max:
                raise ValueError(
                    f"token ids {low} to {high} do not fit into {limits.dtype}, which holds {limits.min} to "
                    f"{limits.max}"
                )
        return numpy.ascontiguousarray(tokens.astype(self.dtype))


def _pieces_of(rows: numpy.ndarray, index: Index) -> Iterator[numpy.ndarray]:
    """Some rows of an index at a time; their memory is given back."""
    for begin in range(0, len(rows), _COPIED_ROWS):
        yield rows[begin : begin + _COPIED_ROWS]
        index.release_memory()


def _open_for_writing(path: str) -> BinaryIO:
    """An empty file that no other process writes at the same time (a killed one gives up its lock)."""
    file = open(path, "ab")  # noqa: SIM115 (the builder closes it)
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.close()
            raise RuntimeError(f"{path} is being written by another process: choose another path") from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        return file
