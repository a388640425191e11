"""Reading the `.metadata` of torch's distributed checkpoints without running what is in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata

from .core import CheckpointingException
from .safe_load import first_line, known_names, stub_class


class RestrictedUnpickler(pickle.Unpickler):
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
        return stub_class(path)


def _get_layout(text: str) -> Any:
    """Memory layout of the given name; what torch's own files call to name one."""
    return {str(layout): layout for layout in (torch.strided, torch.sparse_coo)}.get(text, torch.strided)


def _metadata_names() -> dict[str, Any]:
    """Names that the `.metadata` file of torch's distributed checkpoint may contain."""
    names: dict[str, Any] = dict(known_names())
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
            content = RestrictedUnpickler(file, _metadata_names()).load()
    except OSError:
        raise
    except Exception as error:
        raise CheckpointingException(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dcp_metadata.Metadata) or not isinstance(content.state_dict_metadata, dict):
        raise CheckpointingException(f"{path} is not the metadata of a distributed checkpoint")
    return content
