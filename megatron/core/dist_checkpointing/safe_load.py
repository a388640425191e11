"""Reading pickled files without running what is in them.

Classes on a short list are rebuilt; any other name that a file mentions becomes an inert `Stub` that only
remembers its name and arguments. Checkpoints of other programs therefore open without their packages, and
hostile ones do nothing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import enum
import io
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch._weights_only_unpickler import _get_allowed_globals  # what `weights_only` loads without being told

from .core import CheckpointingException


class Stub:
    """Stands for an object of a class that is not on the list: keeps what the file says about it, does
    nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: Any = kwargs or None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'args', ())}>"


def is_stub(value: object) -> bool:
    """Whether `value` stands for an object of an unknown class."""
    return isinstance(value, Stub)


def stub_class(path: str) -> type[Stub]:
    return type(path, (Stub,), {})


def _get_enum_member(owner: Any, name: str) -> Any:
    """What `getattr` is to a file: the way some Python versions pickle enum members, and nothing else."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum):
        return owner[name]
    return Stub(owner, name)


def _from_content(cls: type) -> Callable[..., Any]:
    """`cls` as files may call it: with its content, not with a size or a range that makes it fill the memory."""

    def make(*args: Any) -> Any:
        if any(not isinstance(arg, (str, bytes, bytearray, list, tuple, dict, set, frozenset)) for arg in args):
            raise pickle.UnpicklingError(f"{cls.__name__} of {', '.join(type(arg).__name__ for arg in args)}")
        return cls(*args)

    return make


_registered: dict[str, Any] = {}


def register_safe_class(cls: type, *other_paths: str) -> None:
    """Let files contain objects of `cls`, under its own dotted path and `other_paths`.

    The constructor and `__setstate__` of the class run with arguments from the file: only for plain value
    types.
    """
    for path in (f"{cls.__module__}.{cls.__qualname__}", *other_paths):
        _registered[path] = cls


def registered_class(path: str) -> Any:
    """What `register_safe_class` was given for that path; None if nothing."""
    return _registered.get(path)


def known_names() -> dict[str, Any]:
    """Dotted path in a file -> class or harmless function."""
    array = np.zeros(1)
    reconstruct, scalar = array.__reduce__()[0], np.float64(0).__reduce__()[0]
    names: dict[str, Any] = {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": argparse.Namespace,
        "collections.OrderedDict": collections.OrderedDict,
        "collections.defaultdict": collections.defaultdict,
        "_io.BytesIO": io.BytesIO,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        **{f"numpy.{module}.multiarray._reconstruct": reconstruct for module in ("core", "_core")},
        **{f"numpy.{module}.multiarray.scalar": scalar for module in ("core", "_core")},
    }
    for module in ("builtins", "__builtin__"):
        for plain in (slice, complex, int, float, bool, str):  # no range: a set of one fills the memory
            names[f"{module}.{plain.__name__}"] = plain
        for container in (set, frozenset, bytes, bytearray, list, dict, tuple):
            names[f"{module}.{container.__name__}"] = _from_content(container)
        names[f"{module}.getattr"] = _get_enum_member
    for code in np.typecodes["All"]:
        kind = type(np.dtype(code))
        names[f"{kind.__module__}.{kind.__qualname__}"] = kind
        names[f"numpy.{np.dtype(code).type.__name__}"] = np.dtype(code).type
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            names[f"{module}.{name}"] = pathlib.PurePosixPath if "Posix" in name else pathlib.PureWindowsPath
    return {**names, **_registered}


def safe_torch_load(
    source: str | Path | IO[bytes] | io.IOBase, map_location: Any = "cpu", mmap: bool = False, name: str | None = None
) -> Any:
    """Content of a file that `torch.save` wrote; objects of unknown classes are `Stub`s.

    Raises:
        CheckpointingException: the file is damaged, not from `torch.save`, or needs a module that is never
            allowed.
        OSError: the file cannot be read.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "checkpoint data")
    file: Any = source
    known: list[Any] = [(value, path) for path, value in known_names().items()]
    with torch.serialization.safe_globals(known):
        try:
            require_plain_archive(file)
            unknown = unknown_names(file)
            if not isinstance(source, (str, Path)):
                file.seek(0)
            stubs: list[Any] = [(stub_class(path), path) for path in unknown]
            with torch.serialization.safe_globals(stubs):
                return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
        except OSError:
            raise
        except Exception as error:
            raise CheckpointingException(f"{name} cannot be read ({first_line(error)})") from error


def unknown_names(file: Any) -> list[str]:
    """Dotted paths in a file that torch's restricted reader does not know."""
    is_zip = zipfile.is_zipfile(file)
    if not isinstance(file, (str, Path)):
        file.seek(0)
    if is_zip:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    known = _get_allowed_globals().keys() | known_names().keys()
    with open(file, "rb") if isinstance(file, (str, Path)) else contextlib.nullcontext(file) as content:
        return sorted(path for path in _names_before_zip(content) if path not in known)


def _names_before_zip(file: IO[bytes]) -> set[str]:
    """What the file's four pickles mention: the format before zip files, of protocol 2. Runs nothing."""
    names: set[str] = set()
    for _ in range(4):
        for operation, argument, _position in pickletools.genops(file):
            if operation.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
    return names


def require_plain_archive(file: Any) -> None:
    """Raise if a zip file would unpack to more than it is: `torch.save` compresses nothing. Rewinds an open `file`."""
    if not zipfile.is_zipfile(file):
        return  # the format before zip files, which has no compression
    with zipfile.ZipFile(file) as archive:
        compressed = [m for m in archive.infolist() if m.compress_type or m.file_size != m.compress_size]
        if compressed:
            raise CheckpointingException(
                f"{compressed[0].filename} is compressed, which torch never does: {compressed[0].compress_size} bytes "
                f"claim to be {compressed[0].file_size}"
            )
    if not isinstance(file, (str, Path)):
        file.seek(0)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
