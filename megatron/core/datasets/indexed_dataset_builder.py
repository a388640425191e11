"""Writing `<prefix>.bin` and `<prefix>.idx`; the format is described in `index_file`."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from array import array
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy
import torch

from megatron.core.datasets.index_file import DType, Index, get_bin_path, get_idx_path, naming, write_index

PARTIAL = ".partial"
"""Suffix of files that are still being written; a killed writer leaves only these behind."""

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
        self._sequence_lengths = array("i")
        self._sequence_modes = array("b")
        self._document_indices = array("q", [0])

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
        lengths: list[int],
        sequence_counts: list[int],
        modes: list[int] | None = None,
    ) -> None:
        """Append several documents; `sequence_counts` says how many of the `lengths` belong to each."""
        tokens = self._stored(tensor)
        modes = [0] * len(lengths) if modes is None else modes
        if sum(lengths) != tokens.size or sum(sequence_counts) != len(lengths) or len(modes) != len(lengths):
            raise ValueError(
                f"{tokens.size} tokens, {len(lengths)} lengths that sum to {sum(lengths)}, {len(modes)} "
                f"modes and documents of {sum(sequence_counts)} sequences do not fit together"
            )
        with naming(self.bin_path):
            self._file.write(tokens.data)
        first = self.num_sequences
        self._append_sequences(lengths, modes)
        self._document_indices.extend((first + numpy.cumsum(sequence_counts, dtype=numpy.int64)).tolist())

    def add_index(self, path_prefix: str) -> None:
        """Append all documents of another dataset of the same dtype."""
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
        self._sequence_lengths.frombytes(index.sequence_lengths.astype(numpy.int32).tobytes())
        self._document_indices.frombytes((index.document_indices[1:] + first).astype(numpy.int64).tobytes())
        if index.sequence_modes is not None:
            self._sequence_modes.frombytes(index.sequence_modes.tobytes())
        with open(get_bin_path(path_prefix), "rb") as source, naming(self.bin_path):
            shutil.copyfileobj(source, self._file, 1 << 24)

    def finalize(self, idx_path: str) -> None:
        """Publish the dataset under its names."""
        self.complete(idx_path)
        self.publish()

    def complete(self, idx_path: str) -> None:
        """Write all that is left to write, still under temporary names: what can fail, fails here."""
        modes = numpy.frombuffer(self._sequence_modes, numpy.int8) if self.multimodal else None
        lengths = numpy.frombuffer(self._sequence_lengths, numpy.intc)
        documents = numpy.frombuffer(self._document_indices, numpy.int64)
        self._idx_path = idx_path
        write_index(idx_path + PARTIAL, self.dtype, lengths, documents, modes)
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

    def _append_sequences(self, lengths: list[int], modes: list[int]) -> None:
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
