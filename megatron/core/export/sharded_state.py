"""The model in a sharded checkpoint (`torch_dist`, `safetensors`) as whole tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.reading import plan_reads, read_tensors
from megatron.core.dist_checkpointing.strategies.resharding import plan_local_read
from megatron.core.dist_checkpointing.strategies.sharded_files import ShardedFilesLoadStrategy

from .whole_state import Stacked, WholeState, name_at, stacked_axes

_NOT_OF_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.")


class ShardedState(WholeState):
    """Reads one tensor at a time, from as many files as its parts lie in.

    Raises:
        CheckpointingException: `directory` is no sharded checkpoint, or is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        strategy = get_default_load_sharded_strategy(self.directory)
        if not isinstance(strategy, ShardedFilesLoadStrategy):
            raise CheckpointingException(f"{directory}: {type(strategy).__name__} has no table of contents")
        self._strategy, self._catalog = strategy, strategy.read_catalog(self.directory)
        self._places: dict[str, Stacked] = {}
        for key, stored in self._catalog.tensors.items():
            if _NOT_OF_MODEL.match(key):
                continue
            depths = stored.global_shape[: stacked_axes(key)]
            for place in product(*map(range, depths)):
                self._places[name_at(key, place)] = Stacked(key, place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def meta(self, name: str) -> Tensor:
        key, place = self._places[name]
        stored = self._catalog.tensors[key]
        return torch.empty(stored.global_shape[len(place) :], dtype=stored.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        key, place = self._places[name]
        stored, meta = self._catalog.tensors[key], self.meta(name)
        shard = ShardedTensor(
            key,
            torch.empty(meta.shape, dtype=stored.dtype),
            stored.dtype,
            tuple(meta.shape),
            stored.global_shape,
            place + (0,) * meta.dim(),
            None,
            prepend_axis_num=len(place),
        )
        plan = plan_local_read(shard, stored.shape, stored.original_shape)
        read_tensors(plan_reads(self._catalog, plan.targets), self._catalog, self.directory, self._strategy.open_chunk)
        assert shard.data is not None
        return shard.data
