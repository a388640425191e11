"""Reading pickled files without running what is in them.

Classes on a short list are rebuilt; any other name that a file mentions becomes an inert `Stub` that only
remembers its name and arguments. Checkpoints of other programs therefore open without their packages, and
hostile ones do nothing.
"""

from __future__ import annotations

import argparse
import collections
import enum
import io
import pathlib
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata

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


def _stub_class(path: str) -> type[Stub]:
    return type(path, (Stub,), {})


def _get_enum_member(owner: Any, name: str) -> Any:
    """What `getattr` is to a file: the way some Python versions pickle enum members, and nothing else."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum):
        return owner[name]
    return Stub(owner, name)


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


def _known_names() -> dict[str, Any]:
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
        for plain in (
            set,
            frozenset,
            slice,
            range,
            complex,
            bytearray,
            int,
            float,
            bool,
            str,
            bytes,
            list,
            dict,
            tuple,
        ):
            names[f"{module}.{plain.__name__}"] = plain
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
    source: str | Path | io.IOBase, map_location: Any = "cpu", mmap: bool = False, name: str | None = None
) -> Any:
    """Content of a file that `torch.save` wrote; objects of unknown classes are `Stub`s.

    Raises:
        CheckpointingException: the file is damaged, not from `torch.save`, or needs a module that is never
        allowed.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "checkpoint data")
    file: Any = source
    known: list[Any] = [(value, path) for path, value in _known_names().items()]
    with torch.serialization.safe_globals(known):
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if not isinstance(source, (str, Path)):
                source.seek(0)
            stubs: list[Any] = [(_stub_class(path), path) for path in unknown]
            with torch.serialization.safe_globals(stubs):
                return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
        except OSError:
            raise
        except Exception as error:
            raise CheckpointingException(f"{name} cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler for which only the names in `known` exist."""

    def __init__(self, file: IO[bytes], known: dict[str, Any]) -> None:
        super().__init__(file)
        self.known = known

    def find_class(self, module_name: str, global_name: str) -> Any:
        path = f"{module_name}.{global_name}"
        if path in self.known:
            return self.known[path]
        if module_name == "torch":
            value = getattr(torch, global_name, None)
            if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) or value is torch.Size:
                return value
        return _stub_class(path)


def _get_layout(text: str) -> Any:
    """Memory layout of the given name; what torch's own files call to name one."""
    return {str(layout): layout for layout in (torch.strided, torch.sparse_coo)}.get(text, torch.strided)


def _metadata_names() -> dict[str, Any]:
    """Names that the `.metadata` file of torch's distributed checkpoint may contain."""
    names: dict[str, Any] = dict(_known_names())
    for module, classes in (
        (
            dcp_metadata,
            (
                "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
                "_MEM_FORMAT_ENCODING MetadataIndex StorageMeta"
            ),
        ),
        (dcp_filesystem, "_StorageInfo"),
    ):
        for cls in classes.split():
            if hasattr(module, cls):
                names[f"{module.__name__}.{cls}"] = getattr(module, cls)
    names["torch.serialization._get_layout"] = _get_layout
    return names


def load_dcp_metadata(path: Path) -> dcp_metadata.Metadata:
    """Content of a `.metadata` file, also of other releases that store classes of their own beside it."""
    try:
        with open(path, "rb") as file:
            content = _RestrictedUnpickler(file, _metadata_names()).load()
    except OSError:
        raise
    except Exception as error:
        raise CheckpointingException(f"{path} cannot be read ({_first_line(error)})") from error
    if not isinstance(content, dcp_metadata.Metadata) or not isinstance(content.state_dict_metadata, dict):
        raise CheckpointingException(f"{path} is not the metadata of a distributed checkpoint")
    return content
