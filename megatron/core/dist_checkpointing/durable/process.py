"""A process that writes files out of memory that it shares with the training process.

Requests and answers are lines of JSON on standard input and output. A request names a descriptor of shared memory and,
for each file, its path and its range in that memory; the answer has the record of each file, or the error. The process
ends when its standard input does, and the kernel kills it when the training process dies.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TextIO

from .file import FileRecord, write_durably

BOOT = """
import importlib.util as u, sys
spec = u.spec_from_file_location("_durable", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["_durable"] = package = u.module_from_spec(spec)
spec.loader.exec_module(package)
from _durable.process import serve
serve(sys.stdin, sys.stdout)
"""
"""What the interpreter runs (`-c`), with the folder of this package as argument: nothing else is imported."""

_PR_SET_PDEATHSIG = 1


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the training process, which then closes this one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler's warning goes to the whole group
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for line in requests:
        try:
            answer: dict[str, Any] = {"records": write_ranges(**json.loads(line))}
        except OSError as error:
            answer = {"errno": error.errno, "error": error.strerror or str(error), "file": error.filename}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def write_ranges(descriptor: int, size: int, files: list[tuple[str, int, int]]) -> dict[str, tuple[int, str]]:
    """Write files side by side; path -> (size, checksum).

    Args:
        descriptor: of shared memory of `size` bytes.
        files: (path, offset, number of bytes) of each file.
    """
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as memory:
        records = write_views([(path, memoryview(memory)[at : at + count]) for path, at, count in files])
    return {path: (record.size, record.checksum) for path, record in records.items()}


def write_views(files: Iterable[tuple[str, memoryview]]) -> dict[str, FileRecord]:
    """Write (path, content) side by side, each on a thread of its own."""
    files = list(files)
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        jobs = [(path, pool.submit(_write, path, view)) for path, view in files]
        return {path: job.result() for path, job in jobs}


def _write(path: str, view: memoryview) -> FileRecord:
    with view:
        return write_durably(path, [view])
