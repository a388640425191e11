"""Reading a checkpoint whose parts lie where only some ranks see them, into the layout that wrote it.

Each rank says what it can read and what it wants. What a rank cannot read itself it gets from one that can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device

from ..collective import gather_from_all, rank_and_size, together
from ..core import CheckpointingException
from ..dict_utils import dict_list_map_outplace, nested_values
from ..mapping import ShardedObject, ShardedStateDict, ShardedTensor, StateDict
from .base import LoadShardedStrategy
from .catalog import TensorEntry
from .reading import plan_reads, read_tensors
from .resharding import Box, ReadTarget
from .sharded_files import tensor_entry
from .torch_files import open_chunk, read_catalog, read_objects

Piece = tuple[str, tuple[int, ...]]
"""(name of a tensor, offsets of a chunk of it); (unique key, ()) of an object."""


@dataclass(frozen=True)
class _Exchange:
    """What one rank reads for others."""

    piece: Piece
    reader: int
    receivers: tuple[int, ...]


class ScatteredLoadStrategy(LoadShardedStrategy):
    """Reads from those of the directories that this rank sees, each with a table of contents of its own.

    Raises:
        CheckpointingException: on every rank, before anything is changed: a part that is wanted is nowhere.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._catalogs = {directory: read_catalog(directory) for directory in directories}
        self._where: dict[Piece, Path] = {}
        for directory, catalog in self._catalogs.items():
            for key, tensor in catalog.tensors.items():
                for chunk in tensor.chunks:
                    self._where.setdefault((key, chunk.box.offsets), directory)
            for key in catalog.objects:
                self._where.setdefault((key, ()), directory)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        raise NotImplementedError("no rank sees all tensors of a scattered checkpoint")

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        wanted: dict[Piece, list[tuple[TensorEntry, ShardedTensor]]] = defaultdict(list)
        objects: dict[Piece, Any] = {}
        with together("cannot load the scattered checkpoint"):
            for value in nested_values(sharded_state_dict):
                if isinstance(value, ShardedObject):
                    objects[value.unique_key, ()] = None
                    continue
                value.init_data("cpu")
                if value.data.numel():
                    entry = tensor_entry(value)
                    wanted[entry.key, entry.offsets].append((entry, value))
        exchanges = self._plan({*wanted, *objects})
        with together("cannot read the scattered checkpoint"):
            for piece, places in wanted.items():
                for entry, value in places if piece in self._where else ():
                    assert value.data is not None
                    self._read(entry.key, Box(entry.offsets, entry.sizes), value.data.detach())
            for piece in objects:
                if piece in self._where:
                    objects[piece] = self._read_object(piece)
        for exchange in exchanges:
            if "/shard_" in exchange.piece[0] and not exchange.piece[1]:
                self._pass_object(exchange, objects)
            else:
                self._pass_tensor(exchange, wanted.get(exchange.piece, []))
        return dict_list_map_outplace(
            lambda v: objects[v.unique_key, ()] if isinstance(v, ShardedObject) else v.data, sharded_state_dict
        )

    def _plan(self, wanted: set[Piece]) -> list[_Exchange]:
        """Who reads what for whom, the same on all ranks."""
        needs = gather_from_all(sorted(wanted))
        has = [set(pieces) for pieces in gather_from_all(list(self._where))]
        missing: dict[Piece, list[int]] = defaultdict(list)
        for rank, pieces in enumerate(needs):
            for piece in pieces:
                if piece not in has[rank]:
                    missing[piece].append(rank)
        load = [0] * len(has)
        exchanges = []
        for piece, receivers in sorted(missing.items()):
            holders = [rank for rank, pieces in enumerate(has) if piece in pieces]
            if not holders:
                raise CheckpointingException(f"{piece[0]} at {piece[1]} is on none of the nodes that are left")
            reader = min(holders, key=lambda rank: (load[rank], rank))
            load[reader] += 1
            exchanges.append(_Exchange(piece, reader, tuple(receivers)))
        return exchanges

    def _read(self, key: str, box: Box, destination: torch.Tensor) -> None:
        directory = self._where[key, box.offsets]
        catalog = self._catalogs[directory]
        host = torch.empty(box.sizes, dtype=catalog.tensors[key].dtype)
        read_tensors(plan_reads(catalog, [ReadTarget(key, box, host)]), catalog, directory, open_chunk)
        destination.copy_(host.reshape(destination.shape))

    def _read_object(self, piece: Piece) -> Any:
        directory = self._where[piece]
        wanted = ShardedObject.empty_from_unique_key(piece[0])
        return read_objects([wanted], self._catalogs[directory], directory)[piece[0]]

    def _box_and_dtype(self, piece: Piece) -> tuple[Box, torch.dtype]:
        tensor = self._catalogs[self._where[piece]].tensors[piece[0]]
        return next(c.box for c in tensor.chunks if c.box.offsets == piece[1]), tensor.dtype

    def _pass_tensor(self, exchange: _Exchange, places: list[tuple[TensorEntry, ShardedTensor]]) -> None:
        """Send a chunk from its reader to the ranks that lack it. The ranks take the exchanges in the same order."""
        rank, where = rank_and_size()[0], device.current_device()
        if rank == exchange.reader:
            box, dtype = self._box_and_dtype(exchange.piece)
            data = torch.empty(box.sizes, dtype=dtype, device=where)
            self._read(exchange.piece[0], box, data)
            for receiver in exchange.receivers:
                dist.send(data.reshape(-1).view(torch.uint8), receiver)
        elif rank in exchange.receivers:
            entry, _ = places[0]
            data = torch.empty(entry.sizes, dtype=entry.dtype, device=where)
            dist.recv(data.reshape(-1).view(torch.uint8), exchange.reader)
            for _, value in places:
                assert value.data is not None
                value.data.detach().copy_(data.reshape(value.data.shape))

    def _pass_object(self, exchange: _Exchange, objects: dict[Piece, Any]) -> None:
        rank = rank_and_size()[0]
        if rank == exchange.reader:
            content = [self._read_object(exchange.piece)]
            for receiver in exchange.receivers:
                dist.send_object_list(content, receiver)
        elif rank in exchange.receivers:
            received = [None]
            dist.recv_object_list(received, exchange.reader)
            objects[exchange.piece] = received[0]
