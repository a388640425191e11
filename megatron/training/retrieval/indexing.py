"""Embedding all passages, on several ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.dist_checkpointing.collective import on_first_rank, together
from megatron.training.retrieval.block_data import BlockData
from megatron.training.retrieval.passages import Passages
from megatron.training.utils import print_rank_0

Embed = Callable[[Tensor, Tensor], Tensor]
"""(tokens, mask [b, s]) -> vectors [b, p]."""


def write_index(embed: Embed, passages: Passages, path: Path, *, batch_size: int, log_interval: int) -> None:
    """Write the vectors of all passages to `path`. All ranks call this.

    Data parallel rank i of n embeds the i-th n-th of the passages and writes it into a shard, which the first rank puts
    together: nothing is communicated, and no rank but the first ever holds all vectors.

    Args:
        batch_size: passages that a rank embeds at once.
        log_interval: batches between lines that say how far it is.
    """
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    total = len(passages.ids)
    own = range(total * rank // size, total * (rank + 1) // size)
    data = BlockData(path)
    with together(f"cannot write {path}"):
        embed_into(data, embed, passages, own, batch_size=batch_size, log_interval=log_interval)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            data.save_shard(rank)
    on_first_rank(f"cannot write {path}", lambda: data.merge_shards_and_save(size))
    print_rank_0(f"the vectors of {total} passages are in {path}")


def embed_into(
    data: BlockData, embed: Embed, passages: Passages, places: range, *, batch_size: int, log_interval: int
) -> None:
    """Add the vectors of the passages at `places` to `data`."""
    begin, ids = time.time(), passages.ids
    for number, first in enumerate(range(places.start, places.stop, batch_size), 1):
        batch = range(first, min(first + batch_size, places.stop))
        columns = [torch.from_numpy(numpy.stack(parts)) for parts in zip(*(passages.tokens(place) for place in batch))]
        tokens, mask = (column.to(device.current_device()) for column in columns)
        with torch.no_grad():
            vectors = embed(tokens, mask)
        data.add_block_data([ids[place] for place in batch], vectors.float().cpu().numpy())
        if number % log_interval == 0:
            rate = (batch.stop - places.start) / (time.time() - begin)
            print_rank_0(
                f"> batch {number}: {batch.stop - places.start} of {len(places)} passages, {rate:.1f} a second"
            )
