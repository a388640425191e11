"""Writing planned files while training goes on: a copy of their content first, then the writing behind its back.

The copy lies in memory that a writer process shares, so that neither the interpreter's lock nor the garbage collector
of the training process is involved. The memory is kept from save to save; while one save is being written, the next
one waits. So it never holds more than what one save of this rank writes.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..core import CheckpointingException
from ..durable import FileRecord, process
from .file_plan import FilePlan, segment_size

_PAGE = mmap.PAGESIZE
_COPIERS = min(4, os.cpu_count() or 1)

StagedFile = tuple[str, int, int]
"""(file name, offset in the buffer, number of bytes)."""


class StagingBuffer:
    """Memory that other processes can map; grows as needed and never shrinks."""

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise CheckpointingException("saving in the background needs memfd_create, which only Linux has")
        self.descriptor = os.memfd_create("checkpoint")
        self.size = 0
        self._memory = mmap.mmap(-1, _PAGE)
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes. All pages are made here, not one by one while a copy waits for them; other
        threads run meanwhile.

        Raises:
            OSError: there is not as much memory.
        """
        if size <= self.size:
            return
        size = -(-size // _PAGE) * _PAGE
        os.posix_fallocate(self.descriptor, 0, size)
        self._memory = mmap.mmap(self.descriptor, size)
        self._tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._tensor.numpy()[self.size :: _PAGE] = 0  # maps the pages, too
        self.size = size

    def copy_in(self, plans: Iterable[FilePlan]) -> list[StagedFile]:
        """Copy the content of files in; each begins at a page."""
        plans = list(plans)
        starts, position = [], 0
        for plan in plans:
            starts.append(position)
            position += -(-plan.num_bytes // _PAGE) * _PAGE
        self.reserve(max(position, _PAGE))
        with ThreadPoolExecutor(_COPIERS) as pool:
            jobs = [pool.submit(self._copy_file, plan, start) for plan, start in zip(plans, starts)]
        for job in jobs:
            job.result()
        return [(plan.name, start, plan.num_bytes) for plan, start in zip(plans, starts)]

    def _copy_file(self, plan: FilePlan, at: int) -> None:
        for segment in plan.segments:
            self._copy_segment(segment, at)
            at += segment_size(segment)

    def _copy_segment(self, segment: bytes | torch.Tensor, at: int) -> None:
        size = segment_size(segment)
        if not size:
            return
        if isinstance(segment, bytes):
            self._memory[at : at + size] = segment
            return
        flat = segment.detach().contiguous().reshape(-1)
        self._tensor[at : at + size].copy_(flat.view(torch.uint8))

    def view(self, at: int, size: int) -> memoryview:
        """The bytes of a range."""
        return memoryview(self._memory)[at : at + size]

    def close(self) -> None:
        """Give the memory back."""
        self._tensor = torch.empty(0, dtype=torch.uint8)
        self._memory = mmap.mmap(-1, _PAGE)
        self.size = 0
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class WriterProcess:
    """A process that writes files out of a `StagingBuffer`."""

    def __init__(self, buffer: StagingBuffer) -> None:
        folder = str(Path(process.__file__).parent)
        self._buffer = buffer
        self._process = subprocess.Popen(
            [sys.executable, "-c", process.BOOT, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(buffer.descriptor,),
            text=True,
        )

    def write(self, files: list[StagedFile], directory: Path) -> dict[str, FileRecord]:
        """Have files written into `directory`; waits until they are on the disk.

        Raises:
            OSError: what the process failed with.
            CheckpointingException: the process has died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        paths = [(str(directory / name), at, size) for name, at, size in files]
        request = {"descriptor": self._buffer.descriptor, "size": self._buffer.size, "files": paths}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            raise CheckpointingException(f"the process that writes checkpoints has died (exit {self._process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            if answer.get("errno"):
                raise OSError(answer["errno"], answer["error"], answer["file"])
            raise CheckpointingException(answer["error"])
        return {Path(path).name: FileRecord(*record) for path, record in answer["records"].items()}

    def close(self) -> None:
        """Let the process end, and wait for it."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it has died with a request unread
                self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class ThreadWriter:
    """Writes on the thread that calls it: for machines on which no further process may be started."""

    def __init__(self, buffer: StagingBuffer) -> None:
        self._buffer = buffer

    def write(self, files: list[StagedFile], directory: Path) -> dict[str, FileRecord]:
        """Write files into `directory`; they are on the disk on return."""
        records = process.write_views([(str(directory / n), self._buffer.view(at, size)) for n, at, size in files])
        return {Path(path).name: record for path, record in records.items()}

    def close(self) -> None:
        """Nothing to do."""


WRITERS: dict[str, Any] = {"process": WriterProcess, "thread": ThreadWriter}


class BackgroundSaver:
    """Stages the files of one save after the other and writes them.

    Args:
        writer: `process` or `thread`.
        persistent: keep the process between saves.
    """

    def __init__(self, writer: str = "process", persistent: bool = False) -> None:
        if writer not in WRITERS:
            raise ValueError(f"no way to write in the background is called {writer!r}; there are {', '.join(WRITERS)}")
        self.kind, self.persistent = writer, persistent
        self._free = threading.Event()
        self._free.set()
        self._buffer: StagingBuffer | None = None
        self._writer: Any = None
        self._preparation: threading.Thread | None = None

    def prepare(self, size: int) -> None:
        """Make the memory for saves of about `size` bytes, in the background, before the first one needs it."""
        if self._buffer is None:
            self._buffer = StagingBuffer()
            self._preparation = threading.Thread(target=self._reserve, args=(size,), name="checkpoint memory")
            self._preparation.start()

    def _reserve(self, size: int) -> None:
        assert self._buffer is not None
        with suppress(OSError):  # the save itself will say so
            self._buffer.reserve(size)

    def stage(self, plans: list[FilePlan], directory: Path) -> StagedSave:
        """Copy the content of files, so that the tensors may change; waits for the save before this one."""
        self._free.wait()
        self._end_preparation()
        if self._buffer is None:
            self._buffer = StagingBuffer()
        files = self._buffer.copy_in(plans)
        if self._writer is None:
            self._writer = WRITERS[self.kind](self._buffer)
        self._free.clear()
        return StagedSave(self, files, directory)

    def write(self, files: list[StagedFile], directory: Path) -> dict[str, FileRecord]:
        """Write what was staged; called once for each `stage`, on any thread."""
        try:
            return self._writer.write(files, directory)
        except CheckpointingException:
            self._drop_writer()
            raise
        finally:
            if not self.persistent:
                self._drop_writer()
            self._free.set()

    def _end_preparation(self) -> None:
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Wait for the last save; end the process and free the memory."""
        self._free.wait()
        self._end_preparation()
        self._drop_writer()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None


class StagedSave:
    """A save whose content has been copied; `write` may run on another thread."""

    def __init__(self, saver: BackgroundSaver, files: list[StagedFile], directory: Path) -> None:
        self._saver, self._files, self._directory = saver, files, directory
        self.records: dict[str, FileRecord] = {}

    def write(self) -> None:
        """Write the files; afterwards `records` says what they must be to be whole."""
        self.records = self._saver.write(self._files, self._directory)
