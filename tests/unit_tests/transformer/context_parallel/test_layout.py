"""Which tokens a rank holds and which blocks it computes, exhaustively over small sizes."""

from __future__ import annotations

import itertools

import pytest

from megatron.core.transformer.context_parallel.layout import (
    CAUSAL_WINDOW,
    NO_WINDOW,
    Block,
    Order,
    SequenceLayout,
    blocks,
    checked,
    positions,
    uniform_layout,
)

LENGTH = 24
BORDERS = [(0, 24), (0, 1, 5, 6, 13, 24), (0, 8, 16, 24), (0, 12, 13, 14, 15, 24)]
PIECES = {1: BORDERS, 2: [(0, 24), (0, 8, 24), (0, 4, 8, 24)], 3: [(0, 24), (0, 6, 24)], 4: [(0, 24), (0, 8, 16, 24)]}
LAYOUTS = [
    SequenceLayout(LENGTH, size, (pieces,), (documents,))
    for size in PIECES
    for pieces in PIECES[size]
    for documents in {*BORDERS, pieces}
]
WINDOWS = [CAUSAL_WINDOW, NO_WINDOW, (3, 0), (0, 0), (5, 2), (-1, 4), (2, -1)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_lies_on_one_rank_and_positions_grow(layout: SequenceLayout) -> None:
    parts = [positions(layout, rank) for rank in range(layout.size)]
    assert sorted(itertools.chain(*parts)) == list(range(LENGTH))
    assert all(part == sorted(part) and len(part) == LENGTH // layout.size for part in parts)


def sees(layout: SequenceLayout, window: tuple[int, int], query: int, key: int) -> bool:
    """Whether a query sees a key, from the definition."""
    (borders,) = layout.documents
    document = [sum(border <= place for border in borders) for place in (query, key)]
    left, right = window
    return document[0] == document[1] and (left < 0 or key >= query - left) and (right < 0 or key <= query + right)


def pairs_of(block: Block, window: tuple[int, int]) -> set[tuple[int, int]]:
    """(offset of the query, offset of the key) of all pairs of a block."""
    left, right = {Order.ALL: (-1, -1), Order.CAUSAL: (-1, 0), Order.BAND: window}[block.order]
    found = set()
    for i, j in itertools.product(range(*block.queries), range(*block.keys)):
        gap = i - block.queries[0] + block.distance - (j - block.keys[0])
        if (left < 0 or gap <= left) and (right < 0 or gap >= -right):
            found.add((i, j))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_hold_each_visible_pair_once(layout: SequenceLayout) -> None:
    for window, query_rank in itertools.product(WINDOWS, range(layout.size)):
        mine = positions(layout, query_rank)
        expected = {(q, k) for q in mine for k in range(LENGTH) if sees(layout, window, q, k)}
        for key_ranks in ([*range(layout.size)], [None]):
            found: list[tuple[int, int]] = []
            for key_rank in key_ranks:
                theirs = positions(layout, key_rank) if key_rank is not None else range(LENGTH)
                for block in blocks(layout, query_rank, key_rank, window):
                    if block.order is Order.CAUSAL:
                        assert block.queries[1] - block.queries[0] == block.keys[1] - block.keys[0]
                    found += [(mine[i], theirs[j]) for i, j in pairs_of(block, window)]
            assert len(found) == len(set(found))
            assert set(found) == expected


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_causal_work_is_few_blocks_and_equal_on_all_ranks(size: int) -> None:
    layout = uniform_layout(16 * size, size)
    for query_rank in range(size):
        by_key_rank = [blocks(layout, query_rank, key_rank, CAUSAL_WINDOW) for key_rank in range(size)]
        assert all(len(found) == 1 for found in by_key_rank)  # one kernel a hop
        areas = [len(pairs_of(found[0], CAUSAL_WINDOW)) for found in by_key_rank]
        assert areas[query_rank] == 16 * 17 // 2
        assert areas[:query_rank] + areas[query_rank + 1 :] == [16 * 8] * (size - 1)


def test_without_order_a_rank_sees_another_in_one_block() -> None:
    assert blocks(uniform_layout(16, 2), 0, 1, NO_WINDOW) == (Block((0, 8), (0, 8), Order.ALL),)


def test_lengths_that_do_not_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 12 tokens does not cut into 8 equal chunks.*pad it to 16"):
        uniform_layout(12, 4)
    with pytest.raises(ValueError, match="a sequence of 6 tokens does not cut into 4"):
        checked(SequenceLayout(16, 2, ((0, 6, 16),), ((0, 6, 16),)))
