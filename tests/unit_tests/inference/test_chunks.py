"""Chunks of the cache: who holds them, which beginnings are known, and attention over them."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron.core.inference.contexts import ChunkAllocator
from megatron.core.inference.contexts.paged_attention import attend_to_chunks, attend_to_past, chunk_table
from megatron.core.inference.contexts.prefix_cache import ROOT, PrefixCache


def test_a_chunk_is_free_when_its_last_holder_is_gone() -> None:
    allocator = ChunkAllocator(6, gtd_chunk_count=2)
    assert allocator.allocate_memory_chunks(2).tolist() == [0, 1]
    assert not allocator.is_memory_available(2, safe=True) and allocator.is_memory_available(3)
    assert allocator.allocate_memory_chunks(4) is None and allocator.chunk_count_avail == 3
    allocator.share(1)
    allocator.release_memory_chunks(torch.tensor([0, 1]))
    assert allocator.chunk_count_avail == 4 and allocator.holders(1) == 1
    assert allocator.take(2) == [0, 2]
    with pytest.raises(KeyError):
        allocator.drop([3])
    allocator.reset()
    assert allocator.chunk_count_avail == 5


def test_random_use_never_loses_or_doubles_a_chunk() -> None:
    """Texts from few words, so that many beginnings are equal, against a plain list of who holds what."""
    rng, allocator = random.Random(4), ChunkAllocator(12, 0)
    cache, held = PrefixCache(allocator, 2), []
    for _ in range(400):
        if held and rng.random() < 0.5:
            allocator.drop(held.pop(rng.randrange(len(held))))
            continue
        tokens = [rng.randrange(2) for _ in range(2 * rng.randrange(1, 4))]
        chunks, number = cache.match(tokens)
        cache.make_room(len(tokens) // 2 - len(chunks))
        more = allocator.take(len(tokens) // 2 - len(chunks))
        if more is None:
            allocator.drop(chunks)
            continue
        for place in range(len(chunks), len(tokens) // 2):
            number = cache.remember(number, tokens[2 * place : 2 * place + 2], more[place - len(chunks)])
        held.append(chunks + more)
        in_use = {chunk for own in held for chunk in own}
        assert allocator.chunk_count_avail + cache.num_spare + len(in_use) == 11
    for own in held:
        allocator.drop(own)
    cache.forget()
    assert allocator.chunk_count_avail == 11


def test_a_beginning_is_known_by_all_its_tokens() -> None:
    allocator = ChunkAllocator(10, 0)
    cache = PrefixCache(allocator, 2)
    first, second = allocator.take(2)
    cache.remember(cache.remember(ROOT, [1, 2], first), [3, 4], second)
    assert cache.match([1, 2, 3, 4, 5])[0] == [first, second]
    assert cache.match([1, 2, 3])[0] == [first]
    assert cache.match([9, 2, 3, 4])[0] == []


def pool_of(texts: list[tuple[torch.Tensor, torch.Tensor]], size: int, scattered: bool) -> tuple:
    """(keys, values, chunks of each text): [l, g, d] texts laid out in chunks."""
    counts = [-(-len(keys) // size) for keys, _ in texts]
    numbers = list(range(sum(counts)))
    if scattered:
        numbers = [3 * number + 1 for number in reversed(numbers)]
    total = max(numbers) + 2
    g, d = texts[0][0].shape[1:]
    keys, values = torch.randn(total, g, size, d), torch.randn(total, g, size, d)
    chunks = []
    for (k, v), count in zip(texts, counts):
        own = [numbers.pop(0) for _ in range(count)]
        for place in range(len(k)):
            keys[own[place // size], :, place % size] = k[place]
            values[own[place // size], :, place % size] = v[place]
        chunks.append(own)
    return keys, values, chunks


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_over_chunks_is_attention(scattered: bool, window: int | None, groups: int) -> None:
    torch.manual_seed(0)
    lengths, size, a, d = [1, 7, 8, 20], 8, 4, 16
    texts = [(torch.randn(length, groups, d), torch.randn(length, groups, d)) for length in lengths]
    keys, values, chunks = pool_of(texts, size, scattered)
    queries = torch.randn(len(lengths), a, d)
    table = chunk_table(chunks, lengths, size, window, torch.device("cpu"))
    if window is None:
        assert table.is_range is not scattered
    found = attend_to_chunks(queries, keys, values, table, d**-0.5)
    for row, (k, v) in enumerate(texts):
        k, v = (x[-window:] if window else x for x in (k, v))
        expected = scaled_dot_product_attention(
            queries[row][:, None], k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
        )
        torch.testing.assert_close(found[row], expected[:, 0])
        own = chunk_table(chunks[row : row + 1], lengths[row : row + 1], size, window, torch.device("cpu"))
        alone = attend_to_chunks(queries[row : row + 1], keys, values, own, d**-0.5)
        torch.testing.assert_close(alone[0], expected[:, 0])
    query = torch.randn(4, a, d)
    k, v = texts[3]
    past = attend_to_past(query, keys, values, torch.tensor(chunks[3]), 16, d**-0.5, window)
    for row in range(4):
        first = 0 if window is None else 17 + row - window
        seen = slice(first, 17 + row)
        expected = scaled_dot_product_attention(
            query[row][:, None], k[seen].transpose(0, 1), v[seen].transpose(0, 1), enable_gqa=True
        )
        torch.testing.assert_close(past[row], expected[:, 0])
