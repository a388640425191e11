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
    bias: Tensor
    """[p, 1, 1, c] fp32: 0 for tokens that are seen, else minus infinity."""
    places: Tensor
    """[n, most entries of a sequence] int64: the entries of each sequence; those with fewer have their first again."""
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
    places: list[list[int]] = [[] for _ in chunks]
    for entry, (_, owner, _, end) in enumerate(rows):
        if end:
            places[owner].append(entry)
    most = max(len(own) for own in places)
    table = torch.tensor(rows, device=device, dtype=torch.int64).t()
    tokens = torch.arange(chunk_size, device=device)
    hidden = (tokens < table[2][:, None]) | (tokens >= table[3][:, None])  # [p, c]
    return ChunkTable(
        table[0],
        table[1],
        torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None, None],
        torch.tensor([own + own[:1] * (most - len(own)) for own in places], device=device),
        first,
        is_range,
    )


def attend_to_chunks(query: Tensor, keys: Tensor, values: Tensor, table: ChunkTable, scale: float) -> Tensor:
    """[n, a, dv]: one query of each sequence against its chunks.

    Args:
        query: [n, a, d].
        keys, values: the pool, [chunks, g, c, d or dv].
    """
    (n, a, d), g = query.shape, keys.size(1)
    keys, values = (_entries(pool, table) for pool in (keys, values))
    queries = query.view(n, g, a // g, d)
    if n > 1:
        queries = queries[table.owner]  # [p, g, r, d]
    scores = torch.add(table.bias, torch.matmul(queries, keys.transpose(2, 3)), alpha=scale)  # [p, g, r, c] fp32
    merge = _merge_one if n == 1 else _merge
    return merge(scores, values, table).to(query.dtype).view(n, a, values.size(-1))


def _merge_one(scores: Tensor, values: Tensor, table: ChunkTable) -> Tensor:
    """[g, r, dv] of the scores [p, g, r, c] of a single sequence."""
    p, c = scores.size(0), scores.size(3)
    if p == 1:
        return torch.matmul(scores.softmax(-1).to(values.dtype), values)
    weights = scores.permute(1, 2, 0, 3).flatten(2).softmax(-1)  # [g, r, p * c]
    weights = weights.unflatten(2, (p, c)).permute(2, 0, 1, 3).to(values.dtype)
    return torch.matmul(weights, values).float().sum(0)


def _merge(scores: Tensor, values: Tensor, table: ChunkTable) -> Tensor:
    """[n, g, r, dv] of the scores [p, g, r, c] of n sequences."""
    top = scores.amax(-1, keepdim=True)  # [p, g, r, 1]
    best = top[table.places].amax(1)  # [n, g, r, 1]
    weights = scores.sub_(best[table.owner]).exp_()
    sums = torch.zeros_like(best).index_add_(0, table.owner, weights.sum(-1, keepdim=True))
    # An entry of nobody has owner 0 and weights of exactly 0.
    found = torch.matmul(weights.to(values.dtype), values).float()  # [p, g, r, dv]
    total = found.new_zeros(len(best), *found.shape[1:]).index_add_(0, table.owner, found)
    return total / sums


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
