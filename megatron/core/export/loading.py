"""Filling the shards of any layout from whole tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.collective import together
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
)
from megatron.core.dist_checkpointing.serialization import load_into
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.catalog import Catalog, Chunk, Place, StoredTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.reading import (
    ChunkRead,
    plan_load,
    plan_reads,
)
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.dist_checkpointing.strategies.sharded_files import whole_tensor

from .mixer_parts import InParts
from .whole_state import DictState, Naming, WholeState


def catalog_of_state(state: WholeState) -> Catalog:
    """The tensors as a sharded checkpoint would list them, with layers stacked and with layers apart."""
    catalog, naming = Catalog(), Naming.of(state)
    stacks: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for name in state:
        for stack_layers in (True, False):
            key, place = naming.place(name, stack_layers)
            stacks[key][place] = name
    for key, names in stacks.items():
        first = state.meta(next(iter(names.values())))
        depths = [max(numbers) + 1 for numbers in zip(*names)]
        stack = StoredTensor(first.dtype, (*depths, *first.shape), None)
        for place, name in names.items():
            box = Box((*place, *(0,) * first.dim()), ((1,) * len(place)) + tuple(state.meta(name).shape))
            stack.chunks.append(Chunk(box, Place(name, 0, 0)))
        catalog.tensors[key] = stack
    return catalog


class WholeStateLoadStrategy(LoadShardedStrategy):
    """Reads each tensor that some local shard needs a part of, once, and copies the parts into place."""

    def __init__(self, state: WholeState) -> None:
        self.state = state = InParts(state)
        self.catalog = catalog_of_state(state)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True  # a model has none that count: they are left out of what is requested

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        """In place; nothing is changed on any rank if shapes or names do not fit."""
        values: list[Any] = list(nested_values(sharded_state_dict))
        with together(f"cannot load {checkpoint_dir}"):
            plan = plan_load(values, self.catalog)
            reads = plan_reads(self.catalog, (target for local in plan.values() for target in local.targets))
        with together(f"cannot read {checkpoint_dir}"):
            for local in plan.values():
                if local.zero_first is not None:
                    local.zero_first.detach().zero_()
            self._read(reads)
        return dict_list_map_outplace(lambda v: v.data if isinstance(v, ShardedTensor) else None, sharded_state_dict)

    def _read(self, reads: list[ChunkRead]) -> None:
        by_name: dict[str, list[ChunkRead]] = defaultdict(list)
        for read in reads:
            by_name[read.chunk.place.file].append(read)
        for name, parts in by_name.items():
            whole = self.state.read(name)
            for read in parts:
                read.copy(whole.reshape(read.chunk.box.sizes))

    def load_tensors_metadata(self, checkpoint_dir: str | Path, metadata: Any = None) -> dict[str, Any]:
        naming = Naming.of(self.state)
        keys = {naming.place(name).key for name in self.state}
        return {
            key: whole_tensor(key, self.catalog.tensors[key].shape, self.catalog.tensors[key].dtype) for key in keys
        }

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return self.load_tensors_metadata(checkpoint_dir)


def keep_absent(request: StateDict, catalog: Catalog, optional: tuple[str, ...]) -> list[str]:
    """Let parameters whose names begin so keep their values if they are not stored; changes `request`, returns them."""
    absent = []
    for name, value in request.items():
        if (
            isinstance(value, ShardedTensor)
            and optional
            and value.key.startswith(optional)
            and value.key not in catalog
        ):
            request[name] = LocalNonpersistentObject(value.data)
            absent.append(value.key)
    return absent


@torch.no_grad()
def load_whole_state(
    model: nn.Module, state: Mapping[str, Tensor] | WholeState, optional: tuple[str, ...] = ()
) -> None:
    """Fill this rank's part of `model` from whole tensors; rows of padded vocabulary become zero. All ranks call this.

    Args:
        optional: parameters whose names begin so keep their values where `state` lacks them.

    Raises:
        CheckpointingException: a tensor is missing or has another shape than the model.
    """
    source = state if isinstance(state, WholeState) else DictState(state)
    strategy = WholeStateLoadStrategy(source)
    request = model.sharded_state_dict()  # type: ignore[operator]
    keep_absent(request, strategy.catalog, optional)
    loaded, _, _ = load_into(
        {},
        request,
        Path("the given tensors"),
        strategy,
        TorchCommonLoadStrategy(),
        validate_access_integrity=False,
    )
    model.load_state_dict(loaded)
