"""Writing a sharded checkpoint (`torch_dist`, `safetensors`) of whole tensors, layer by layer, in one process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.durable import FileRecord, sync_directory, write_durably
from megatron.core.dist_checkpointing.manifest import write_manifest
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    COMMON_FORMATS,
    get_default_save_common_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.catalog import Entry, ObjectEntry, TensorEntry, Written, catalog_of
from megatron.core.dist_checkpointing.strategies.file_plan import FilePlan, segment_bytes, segment_size, write_plans
from megatron.core.dist_checkpointing.strategies.resharding import Shape
from megatron.core.dist_checkpointing.strategies.sharded_files import ShardedFilesSaveStrategy

from .whole_state import Naming, Stacked, WholeState, layer_of

_WITH_EXTRA_STATE = re.compile(r".*\.layers\.(?!.*\.experts\.).*\.linear_\w+\.weight")


def write_sharded_files(
    directory: Path,
    state: WholeState,
    common: Mapping[str, Any],
    backend: str = "torch_dist",
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a complete checkpoint into the empty `directory`: one data file for each layer, and one for each other
    parameter."""
    strategy = get_default_save_sharded_strategy(backend)
    assert isinstance(strategy, ShardedFilesSaveStrategy)
    naming = Naming.of(state)
    depths = _depths(state, naming)
    records: dict[str, FileRecord] = {}
    written: list[Written] = []
    for number, names in enumerate(_groups(state)):
        metas = {name: state.meta(name) for name in names}
        entries = [entry for name, meta in metas.items() for entry in _entries(naming.place(name), meta, depths)]
        plan = strategy.make_file(f"__0_{number}{strategy.data_suffix}", entries)
        source = {id(meta): name for name, meta in metas.items()}
        records[plan.name] = write_durably(directory / plan.name, _bytes_of(plan, state, source, on_progress))
        written += plan.written
    kind, version = COMMON_FORMATS[backend]
    plans = [strategy.make_catalog_file(catalog_of(written))]
    plans += get_default_save_common_strategy(kind, version).plan_common(dict(common)) or []
    records.update(write_plans(plans, directory))
    write_manifest(directory, records)
    sync_directory(directory)
    save_config(CheckpointingConfig(backend, 1, kind, version), directory)
    sync_directory(directory)


def _bytes_of(
    plan: FilePlan, state: WholeState, source: Mapping[int, str], on_progress: Callable[[int], None]
) -> Iterator[Any]:
    """The bytes of a file that was planned with tensors without data; each is read when its turn comes."""
    for segment in plan.segments:
        name = source.get(id(segment))
        yield segment_bytes(segment if name is None else state.read(name))
        if name is not None:
            on_progress(segment_size(segment))


def _depths(state: WholeState, naming: Naming) -> dict[str, Shape]:
    """Numbers of layers and experts under each key."""
    places: dict[str, list[Shape]] = {}
    for name in state:
        key, place = naming.place(name)
        places.setdefault(key, []).append(place)
    return {key: tuple(max(numbers) + 1 for numbers in zip(*those)) for key, those in places.items()}


def _groups(state: WholeState) -> Iterator[list[str]]:
    """Names that share a file: those of a layer, or a single one."""
    layers: dict[tuple[str, int], list[str]] = {}
    for name in state:
        layer = layer_of(name)
        if layer is None:
            yield [name]
        else:
            layers.setdefault(layer, []).append(name)
    yield from layers.values()


def _entries(where: Stacked, whole: Tensor, depths: Mapping[str, Shape]) -> Iterator[Entry]:
    """How a parameter is stored, and the empty state of a linear layer."""
    key, place = where
    depth, shape = depths[key], tuple(whole.shape)
    offsets, sizes = place + (0,) * whole.dim(), (1,) * len(place) + shape
    yield TensorEntry(key, offsets, sizes, (*depth, *shape), None, whole.dtype, whole)
    if _WITH_EXTRA_STATE.fullmatch(key):  # other releases do not load without it
        extra = key.removesuffix("weight") + "_extra_state"
        yield ObjectEntry(ShardedObject(extra, None, depth or (1,), place or (0,)).unique_key, None)
