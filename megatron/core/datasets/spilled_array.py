"""Numbers that are appended without end and read back in order, in bounded memory."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from typing import IO

import numpy

_CHUNK = 1 << 20


class SpilledArray:
    """A growing array of whole numbers; what does not fit into a small buffer lies in a file without a name.

    Such a file is gone as soon as its process ends, however it ends.

    Args:
        typecode: of Python's `array`: b 8 bits, i 32 bits, q 64 bits, all signed.
        folder: where the file is made once it is needed.
    """

    def __init__(self, typecode: str, folder: str) -> None:
        self._buffer = array(typecode)
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._num_spilled = 0

    def __len__(self) -> int:
        return self._num_spilled + len(self._buffer)

    @property
    def dtype(self) -> numpy.dtype:
        """Number type of the chunks."""
        return numpy.dtype(self._buffer.typecode)

    def append(self, value: int) -> None:
        """Add one number; OverflowError: it does not fit."""
        self._buffer.append(value)
        self._spill_if_full()

    def extend(self, values: numpy.ndarray | list[int]) -> None:
        """Add several numbers; OverflowError: one does not fit."""
        if isinstance(values, numpy.ndarray):
            limits = numpy.iinfo(self.dtype)
            if values.size and (values.min() < limits.min or values.max() > limits.max):
                raise OverflowError(f"{values.min()} to {values.max()} do not fit into {self.dtype}")
            self._buffer.frombytes(values.astype(self.dtype, copy=False).tobytes())
        else:
            self._buffer.extend(values)
        self._spill_if_full()

    def chunks(self) -> Iterator[numpy.ndarray]:
        """All numbers, in order, some at a time."""
        if self._file is not None:
            self._file.seek(0)
            while data := self._file.read(_CHUNK * self._buffer.itemsize):
                yield numpy.frombuffer(data, self.dtype)
            self._file.seek(0, 2)
        if self._buffer:
            yield numpy.frombuffer(self._buffer.tobytes(), self.dtype)

    def _spill_if_full(self) -> None:
        if len(self._buffer) < _CHUNK:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with this object)
        self._file.write(self._buffer.tobytes())
        self._num_spilled += len(self._buffer)
        del self._buffer[:]
