"""Attention to keys and values that lie in chunks of one pool.

n sequences, p chunks looked at, c tokens of a chunk, a heads, g query groups, r = a / g, d head width, dv width of a
value.

One query for each sequence goes to the chunks, instead of the chunks' contents to the queries: each chunk that lies
between the first and the last one in use is multiplied with its owner's query where it stands, and the parts of a
sequence are merged by the sums of their exponentials (Flash-Decoding's split of the keys; arXiv:2205.14135, section
3.1). Nothing of the cache is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class ChunkTable:
    """Which chunks the queries of a step look at, one entry [p] for each pair of a chunk and a sequence."""

    chunk: Tensor
    """[p] int64, or the whole range `first` to `last` where `is_range`."""
    owner: Tensor
    """[p] int64: the sequence."""
    begin: Tensor
    """[p] int64: first token of the chunk that is seen."""
    end: Tensor
    """[p] int64: first one that is not seen any more; 0 where none is."""
    first: int = 0
    is_range: bool = False
    """Entries are the chunks `first`, `first` + 1, ... in this order."""


def chunk_table(
    chunks: list[list[int]], lengths: list[int], chunk_size: int, window: int | None, device: torch.device
) -> ChunkTable:
    """The table of sequences that each see their last `window` tokens (all: None) of `lengths`."""
    rows = []
    for owner, (own, length) in enumerate(zip(chunks, lengths)):
        start = 0 if window is None else max(0, length - window)
        for place in range(start // chunk_size, -(-length // chunk_size)):
            base = place * chunk_size
            rows.append((own[place], owner, max(start - base, 0), min(length - base, chunk_size)))
    numbers = [row[0] for row in rows]
    first, span = min(numbers), max(numbers) - min(numbers) + 1
    is_range = len(set(numbers)) == len(numbers) and span <= 2 * len(numbers)
    if is_range:
        filled = [(number, 0, 0, 0) for number in range(first, first + span)]
        for row in rows:
            filled[row[0] - first] = row
        rows = filled
    table = torch.tensor(rows, device=device, dtype=torch.int64).t()
    return ChunkTable(table[0], table[1], table[2], table[3], first, is_range)


def attend_to_chunks(query: Tensor, keys: Tensor, values: Tensor, table: ChunkTable, scale: float) -> Tensor:
    """[n, a, dv]: one query of each sequence against its chunks.

    Args:
        query: [n, a, d].
        keys, values: the pool, [chunks, g, c, d or dv].
    """
    (n, a, d), (g, c) = query.shape, keys.shape[1:3]
    keys, values = (_entries(pool, table) for pool in (keys, values))
    dv = values.size(-1)
    queries = query.view(n, g, a // g, d)[table.owner]  # [p, g, r, d]
    scores = torch.matmul(queries, keys.transpose(2, 3)).float() * scale  # [p, g, r, c]
    places = torch.arange(c, device=query.device)
    hidden = (places < table.begin[:, None]) | (places >= table.end[:, None])  # [p, c]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)  # [p, g, r, 1]
    index = table.owner[:, None, None, None].expand_as(top)
    best = top.new_full((n, *top.shape[1:]), -torch.inf).scatter_reduce_(0, index, top, "amax")
    weights = (scores - best[table.owner]).exp_()
    sums = top.new_zeros(best.shape).index_add_(0, table.owner, weights.sum(-1, keepdim=True))
    # An entry of nobody has owner 0 and weights of exactly 0.
    found = torch.matmul(weights.to(values.dtype), values).float()  # [p, g, r, dv]
    total = found.new_zeros(n, *found.shape[1:]).index_add_(0, table.owner, found)
    return (total / sums).to(query.dtype).view(n, a, dv)


def _entries(pool: Tensor, table: ChunkTable) -> Tensor:
    """[p, g, c, d]: the chunks of the table; where they stand if it is a range."""
    return pool[table.first : table.first + len(table.chunk)] if table.is_range else pool[table.chunk]


def attend_to_past(
    query: Tensor, keys: Tensor, values: Tensor, chunks: Tensor, start: int, scale: float, window: int | None
) -> Tensor:
    """[m, a, dv]: the m newest queries of one sequence, from token `start` on, against all tokens up to their own.

    Args:
        query: [m, a, d].
        keys, values: the pool, [chunks, g, c, d or dv].
        chunks: [p] int64, the sequence's chunks.
    """
    stop = start + query.size(0)
    k, v = (pool[chunks].transpose(0, 1).flatten(1, 2)[None, :, :stop] for pool in (keys, values))  # [1, g, stop, d]
    mask = None
    if start or window is not None:
        rows = torch.arange(start, stop, device=query.device)[:, None]
        columns = torch.arange(stop, device=query.device)
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
    context = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.size(1) != k.size(1),
    )
    return context[0].transpose(0, 1)
