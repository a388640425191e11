"""The `torch_dist` format: torch's own distributed checkpoint (DCP), written and read without its planner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from ..dcp_metadata import load_dcp_metadata
from ..durable.file import replace_durably
from ..manifest import MANIFEST_FNAME, read_manifest, write_manifest
from ..mapping import ShardedObject
from .base import StrategyAction, register_default_strategy
from .catalog import Catalog, Entry
from .file_plan import FilePlan
from .resharding import Shape
from .sharded_files import ShardedFilesLoadStrategy, ShardedFilesSaveStrategy
from .torch_files import (
    DATA_SUFFIX,
    METADATA_FNAME,
    make_data_file,
    metadata_file,
    open_chunk,
    read_catalog,
    read_objects,
)


@dataclass(frozen=True)
class MCoreSavePlan(SavePlan):
    """DCP save plan that also carries the original shapes of flattened tensors; part of the format's public
    names."""

    mcore_data: dict[str, dict[str, Any]] | None = field(default=None)


class TorchDistSaveShardedStrategy(ShardedFilesSaveStrategy):
    """Writes `.distcp` files and `.metadata`."""

    data_suffix = DATA_SUFFIX

    def make_file(self, name: str, entries: list[Entry]) -> FilePlan:
        return make_data_file(name, entries)

    def make_catalog_file(self, catalog: Catalog) -> FilePlan:
        return metadata_file(catalog)

    def own_files(self, directory: Path) -> list[Path]:
        return [directory / METADATA_FNAME, *directory.glob(f"*{DATA_SUFFIX}")]


class TorchDistLoadShardedStrategy(ShardedFilesLoadStrategy):
    """Reads what this program, torch's distributed checkpoint or another Megatron-Core release has written."""

    backend = "torch_dist"

    def read_catalog(self, directory: Path) -> Catalog:
        return read_catalog(directory)

    def open_chunk(self, data: memoryview, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
        return open_chunk(data, dtype, shape)

    def read_objects(self, objects: Iterable[ShardedObject], catalog: Catalog, directory: Path) -> dict[str, Any]:
        return read_objects(objects, catalog, directory)

    def remove_sharded_tensors(self, checkpoint_dir: str | Path, key_prefix: str) -> None:
        """Drop entries from the table of contents, and files that hold nothing else. Not a collective
        call."""
        directory = Path(checkpoint_dir)
        catalog = read_catalog(directory)
        records = read_manifest(directory)
        before = {place.file for place in catalog.places()}
        catalog.tensors = {k: v for k, v in catalog.tensors.items() if not k.startswith(key_prefix)}
        catalog.objects = {k: v for k, v in catalog.objects.items() if not k.startswith(key_prefix)}
        unused = before - {place.file for place in catalog.places()}
        (directory / MANIFEST_FNAME).unlink(missing_ok=True)  # it would contradict what follows
        content = metadata_file(catalog).segments[0]
        assert isinstance(content, bytes)
        record = replace_durably(directory / METADATA_FNAME, content)
        for name in unused:
            (directory / name).unlink()
        if records is not None:
            kept = {name: value for name, value in records.items() if name not in unused}
            write_manifest(directory, {**kept, METADATA_FNAME: record})


def _get_filesystem_reader(checkpoint_dir: str | Path, cache_metadata: bool = False) -> FileSystemReader:
    """DCP reader of the checkpoint's files, which unpickles nothing but the classes that metadata consists
    of."""

    class SafeReader(FileSystemReader):
        _metadata: Metadata | None = None

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            if self._metadata is None or not cache_metadata:
                self._metadata = load_dcp_metadata(Path(checkpoint_dir) / METADATA_FNAME)
            return self._metadata

    return SafeReader(checkpoint_dir)


register_default_strategy(StrategyAction.SAVE_SHARDED, "torch_dist", 1, TorchDistSaveShardedStrategy("torch_dist", 1))
register_default_strategy(StrategyAction.LOAD_SHARDED, "torch_dist", 1, TorchDistLoadShardedStrategy())
