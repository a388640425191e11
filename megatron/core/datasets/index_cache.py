"""Index arrays kept in files, so that only one process builds them and later runs find them."""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy

from megatron.core.datasets.file_identity import difference, identify

logger = logging.getLogger(__name__)

DESCRIPTION = "description.txt"
MANIFEST = "manifest.json"
_LEFTOVER_SECONDS = 3600  # age at which a file under a temporary name belongs to a process that was killed

Arrays = dict[str, numpy.ndarray]
Check = Callable[[Arrays], str | None]
Found = TypeVar("Found")
OnMiss = Callable[[str, Callable[[], Any]], Any]

_TEMPORARY_NAME = re.compile(r"\..+-\w+\.(npy|json|txt)\.[0-9a-f]{32}")
_cleaned: set[str] = set()
"""Folders in which this process has looked for leftovers: a large one takes longer than an index."""

_on_miss: ContextVar[OnMiss | None] = ContextVar("on_miss", default=None)


@contextmanager
def on_cache_miss(handler: OnMiss) -> Iterator[None]:
    """Within the block, `handler(path, load)` is asked before an index that could be kept in files is built.

    It returns what `load` found if another process has built the files meanwhile (`load` looks for them again), or
    None: build them here.
    """
    token = _on_miss.set(handler)
    try:
        yield
    finally:
        _on_miss.reset(token)


def built_by_another_process(path: str, load: Callable[[], Found | None]) -> Found | None:
    """What `load` finds once another process has made the files at `path`; None: make them here."""
    handler = _on_miss.get()
    return None if handler is None else handler(path, load)


class IndexCache:
    """The files `<directory>/<name>-<array>.npy` of one index, `<name>-manifest.json` and `<name>-description.txt`.

    Every file appears under its name only when it is complete, the description last of all: where it stands, the
    index is whole, at whatever moment the process that wrote it was killed. The manifest holds the sizes of the
    arrays and the identity of the files that they were built from; an index without one, written by another
    program, is checked by `check` alone.

    Args:
        directory: where the files lie; None: nothing is kept.
        name: first part of the file names.
        description: what the index was built from.
        sources: paths of the files that it was built from.
    """

    def __init__(self, directory: str | None, name: str, description: str, sources: Sequence[str] = ()) -> None:
        self.directory = None if directory is None else Path(directory)
        self.name = name
        self.description = description
        self.sources = sources

    def path(self, suffix: str) -> Path:
        """Path of one file of the index."""
        assert self.directory is not None
        return self.directory / f"{self.name}-{suffix}"

    def load_or_build(
        self, array_names: tuple[str, ...], check: Check, build: Callable[[], Arrays]
    ) -> tuple[Arrays, bool]:
        """The arrays, memory-mapped from the files if these are there and pass `check`, otherwise built and
        kept.

        Args:
            check: says what is wrong with loaded arrays, None if nothing is.

        Returns:
            The arrays by name, and whether they were built.
        """
        if self.directory is None:
            return build(), True
        finder = _Finder(self, array_names, check)
        arrays = finder.look()
        if arrays is None:
            arrays = built_by_another_process(str(self.path("*")), finder.look)
        if arrays is not None:
            return arrays, False
        identities = [identify(path) for path in self.sources]  # before they are read, in case they change meanwhile
        arrays = build()
        self._save(arrays, identities)
        return arrays, True

    def _load(self, array_names: tuple[str, ...], check: Check) -> Arrays:
        """The arrays of a cache that is there.

        Raises:
            OSError, ValueError, EOFError: they cannot be read or are not the arrays wanted; the message says why.
        """
        prefix = str(self.path(""))  # once: paths as objects cost more than what they lead to
        if _content_of(prefix + DESCRIPTION) != self.description.encode("utf-8"):
            raise ValueError("it describes another index")
        paths = {name: f"{prefix}{name}.npy" for name in array_names}
        self._require_manifest(prefix + MANIFEST, paths)
        arrays = {name: _map_array(path) for name, path in paths.items()}
        if problem := check(arrays):
            raise ValueError(problem)
        return arrays

    def _require_manifest(self, path: str, paths: dict[str, str]) -> None:
        try:
            manifest = json.loads(_content_of(path))
        except FileNotFoundError:
            return
        for name, num_bytes in manifest["arrays"].items():
            found = os.path.getsize(paths[name])
            if found != num_bytes:
                raise ValueError(f"{name} has {found} bytes, {num_bytes} were written")
        if len(manifest["sources"]) != len(self.sources):
            raise ValueError("it was built from other files")
        for path, identity in zip(self.sources, manifest["sources"]):
            if problem := difference(path, identity):
                raise ValueError(f"{problem}: the data has changed since")

    def _save(self, arrays: Arrays, identities: list[dict[str, Any]]) -> None:
        assert self.directory is not None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.path(DESCRIPTION).unlink(missing_ok=True)  # until the last file is there this is no index
            sizes = {}
            for name, array in arrays.items():
                with _replaced(self.path(f"{name}.npy")) as file:
                    numpy.save(file, array, allow_pickle=False)
                    sizes[name] = file.tell()
            manifest = {"arrays": sizes, "sources": identities}
            with _replaced(self.path(MANIFEST)) as file:
                file.write(json.dumps(manifest, indent=1).encode("utf-8"))
            with _replaced(self.path(DESCRIPTION)) as file:
                file.write(self.description.encode("utf-8"))
        except OSError as error:
            logger.warning(
                "index cache cannot be written to %s (%s): every process builds its own; "
                "--data-cache-path names a writable directory",
                self.directory,
                error,
            )

    def _remove_leftovers(self) -> None:
        """Delete what killed processes left in the folder under temporary names, once in each process."""
        assert self.directory is not None
        if str(self.directory) in _cleaned:
            return
        _cleaned.add(str(self.directory))
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not _TEMPORARY_NAME.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):  # another process removed it, or has just completed it
                    if time.time() - entry.stat().st_mtime > _LEFTOVER_SECONDS:
                        os.unlink(entry.path)


class _Finder:
    """Looks for the files of a cache, again and again at little cost while another process builds them."""

    def __init__(self, cache: IndexCache, array_names: tuple[str, ...], check: Check) -> None:
        self._cache = cache
        self._array_names = array_names
        self._check = check
        self._refused: Any = None

    def look(self) -> Arrays | None:
        """The arrays if they are there and sound; a warning, once, if they are there and not."""
        try:
            status = os.stat(self._cache.path(DESCRIPTION))
        except OSError:
            return None
        seen = (status.st_ino, status.st_mtime_ns)
        if seen == self._refused:
            return None
        try:
            return self._cache._load(self._array_names, self._check)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            self._refused = seen
            problem = error if isinstance(error, ValueError) else f"it cannot be read ({error!r})"
            logger.warning("index cache %s is built again: %s", self._cache.path("*"), problem)
            return None


_NPY_START = 128  # bytes that numpy.save writes before an array of one or two dimensions
_NPY_1 = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(rb"\{'descr': '([<|][iu]\d)', 'fortran_order': False, 'shape': \((\d+), ?(\d+)?\), \} *\n")


def _map_array(path: str) -> numpy.ndarray:
    """The array of an `.npy` file, memory-mapped.

    What `numpy.save` writes for our arrays is read here: a run opens thousands of them, and numpy takes half a
    millisecond for the header of each, and more for each use of the kind of array that it returns.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(_NPY_START)
        size = int.from_bytes(start[8:10], "little")
        header = _NPY_HEADER.fullmatch(start, 10, 10 + size) if start.startswith(_NPY_1) else None
        if header is None or 10 + size > len(start):
            return numpy.load(path, mmap_mode="r", allow_pickle=False)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    dtype = numpy.dtype(header[1].decode())
    shape = tuple(int(number) for number in header.groups()[1:] if number is not None)
    num_bytes = math.prod(shape) * dtype.itemsize
    if len(content) < 10 + size + num_bytes:
        name = os.path.basename(path)
        raise ValueError(f"{name} is cut off: it has {len(content)} bytes, {10 + size + num_bytes} are needed")
    return numpy.frombuffer(content, dtype, math.prod(shape), 10 + size).reshape(shape)


def _content_of(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_array(name: str, array: numpy.ndarray, dtype: type[numpy.number], shape: tuple[int, ...]) -> str | None:
    """What is wrong with an array's type or shape, None if nothing is."""
    if array.dtype == dtype and array.shape == shape:
        return None
    return f"{name} is {array.dtype}{list(array.shape)}, expected {numpy.dtype(dtype)}{list(shape)}"
