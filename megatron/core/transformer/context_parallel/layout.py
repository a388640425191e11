"""Which tokens each context parallel rank holds, and which pairs of them attention has to compute. Pure functions.

A sample's s tokens are cut in 2·cp chunks, of which rank c holds chunks c and 2·cp - 1 - c: early chunks see few keys,
late ones many, so that all ranks have equal work under causal attention (Brandon et al., arXiv:2311.09431; Dubey et
al., arXiv:2407.21783, section 3.3.2). Packed sequences are either cut one by one in the same way, or left where the
zigzag over the whole sample puts them.

"Position" is a place on the whole token axis of a sample, "offset" one on the part that a rank holds. In every layout
positions grow with offsets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import pairwise

Span = tuple[int, int]
"""Begin and end of a range; the end is not part of it."""
Window = tuple[int, int]
"""How far a query sees to its left and right; -1 is no limit."""

CAUSAL_WINDOW: Window = (-1, 0)
NO_WINDOW: Window = (-1, -1)


@dataclass(frozen=True)
class SequenceLayout:
    """How samples of `length` tokens lie on `size` ranks.

    `pieces` and `documents` have one entry for each sample of the micro-batch, or one entry that holds for all.
    """

    length: int
    """s, tokens of a whole sample."""
    size: int
    """Ranks over which it is cut."""
    pieces: tuple[tuple[int, ...], ...]
    """Borders (0, ..., s) of what is cut in zigzag by itself."""
    documents: tuple[tuple[int, ...], ...]
    """Borders (0, ..., s) of the tokens that see each other."""

    @property
    def is_uniform(self) -> bool:
        """Whether all samples of the micro-batch lie alike."""
        return len(self.pieces) == 1 and len(self.documents) == 1

    @property
    def num_rows(self) -> int:
        """Samples that are told apart; 1 where all are alike."""
        return max(len(self.pieces), len(self.documents))

    def over(self, size: int) -> SequenceLayout:
        """The same samples on another number of ranks."""
        return replace(self, size=size)

    def row(self, row: int) -> SequenceLayout:
        """What one sample looks like."""
        pieces, documents = self.pieces, self.documents
        return replace(
            self,
            pieces=pieces if len(pieces) == 1 else (pieces[row],),
            documents=documents if len(documents) == 1 else (documents[row],),
        )


@dataclass(frozen=True)
class Segment:
    """Tokens of one document that are contiguous both in the sample and on the rank."""

    offset: int
    position: int
    length: int
    document: int


class Order(Enum):
    """What the queries of a block see of its keys."""

    ALL = "all keys"
    CAUSAL = "keys up to the query's own place in the block, which is square"
    BAND = "keys in the window around the query's position"


@dataclass(frozen=True)
class Block:
    """Queries and keys between which scores are computed; pairs in no block are hidden from each other."""

    queries: Span
    """Offsets on the rank that holds the queries."""
    keys: Span
    """Offsets on the rank that holds the keys."""
    order: Order
    distance: int = 0
    """Position of the first query minus that of the first key; for BAND."""


def uniform_layout(length: int, size: int) -> SequenceLayout:
    """Samples of one sequence each.

    Raises:
        ValueError: they do not cut into 2·size equal chunks.
    """
    return checked(SequenceLayout(length, size, ((0, length),), ((0, length),)))


def checked(layout: SequenceLayout) -> SequenceLayout:
    """`layout`, if its pieces can be cut.

    Raises:
        ValueError: the length of one does not divide by 2·cp.
    """
    parts = 2 * layout.size if layout.size > 1 else 1
    for borders in layout.pieces:
        for begin, end in pairwise(borders):
            if (end - begin) % parts:
                raise ValueError(
                    f"a sequence of {end - begin} tokens does not cut into {parts} equal chunks, two for each of "
                    f"{layout.size} context parallel ranks; pad it to {-(-(end - begin) // parts) * parts}"
                )
    return layout


def runs(layout: SequenceLayout, rank: int) -> list[Span]:
    """Positions that `rank` holds of one sample, in the order of their offsets."""
    (borders,) = layout.pieces
    if layout.size == 1:
        return [(0, layout.length)]
    found = []
    for begin, end in pairwise(borders):
        chunk = (end - begin) // (2 * layout.size)
        for index in (rank, 2 * layout.size - 1 - rank):
            found.append((begin + index * chunk, begin + (index + 1) * chunk))
    return [span for span in found if span[1] > span[0]]


def positions(layout: SequenceLayout, rank: int) -> list[int]:
    """The position of each token that `rank` holds of one sample."""
    return [position for begin, end in runs(layout, rank) for position in range(begin, end)]


def segments(layout: SequenceLayout, rank: int) -> list[Segment]:
    """The tokens that `rank` holds of one sample, cut at the borders of documents."""
    (borders,) = layout.documents
    found, offset, document = [], 0, 0
    for begin, end in runs(layout, rank):
        while begin < end:
            while borders[document + 1] <= begin:
                document += 1
            stop = min(end, borders[document + 1])
            found.append(Segment(offset, begin, stop - begin, document))
            offset, begin = offset + stop - begin, stop
    return found


@lru_cache(maxsize=256)
def blocks(layout: SequenceLayout, query_rank: int, key_rank: int | None, window: Window) -> tuple[Block, ...]:
    """What the queries of one rank have to compute with the keys of another, for one sample.

    Together the blocks of all `key_rank` hold each pair that sees each other exactly once.

    Args:
        key_rank: who holds the keys; None: all keys are here, in the order of their positions.
        window: of what a query sees; causal attention is (-1, 0).
    """
    queries = segments(layout, query_rank)
    keys = segments(layout, key_rank) if key_rank is not None else segments(layout.over(1), 0)
    by_document: dict[int, list[Segment]] = {}
    for key in keys:
        by_document.setdefault(key.document, []).append(key)
    found: list[Block] = []
    for query in queries:
        for block in _blocks_of(query, by_document.get(query.document, []), window):
            _append(found, block)
    return tuple(found)


def _blocks_of(query: Segment, keys: list[Segment], window: Window) -> list[Block]:
    """Blocks of one run of queries with the keys of its document."""
    found = []
    span = (query.offset, query.offset + query.length)
    for key in keys:
        order = _order(query, key, window)
        if order is not None:
            distance = query.position - key.position if order is Order.BAND else 0
            found.append(Block(span, (key.offset, key.offset + key.length), order, distance))
        elif window == CAUSAL_WINDOW and key.position < query.position + query.length:
            # Keys that begin before the queries and end within or behind them: those before, then the square.
            before = query.position - key.position
            if before > 0:
                found.append(Block(span, (key.offset, key.offset + before), Order.ALL))
            found.append(Block(span, (key.offset + before, key.offset + before + query.length), Order.CAUSAL))
    return found


def _order(query: Segment, key: Segment, window: Window) -> Order | None:
    """How all queries see all keys; None where they do not, or not in one block."""
    left, right = window
    nearest = query.position - (key.position + key.length - 1)
    farthest = query.position + query.length - 1 - key.position
    if (left >= 0 and nearest > left) or (right >= 0 and farthest < -right):
        return None
    if (left < 0 or farthest <= left) and (right < 0 or nearest >= -right):
        return Order.ALL
    if window != CAUSAL_WINDOW:
        return Order.BAND
    return Order.CAUSAL if (query.position, query.length) == (key.position, key.length) else None


def _append(found: list[Block], block: Block) -> None:
    """Add a block, joined with earlier ones where that makes one block of them."""
    while found:
        joined = _joined(found[-1], block)
        if joined is None and len(found) > 1:
            joined = _joined_squares(found[-2], found[-1], block)
            if joined is not None:
                found.pop()
        if joined is None:
            break
        found.pop()
        block = joined
    found.append(block)


def _joined(a: Block, b: Block) -> Block | None:
    """Two full blocks side by side."""
    if a.order is not Order.ALL or b.order is not Order.ALL:
        return None
    if a.queries == b.queries and a.keys[1] == b.keys[0]:
        return Block(a.queries, (a.keys[0], b.keys[1]), Order.ALL)
    if a.keys == b.keys and a.queries[1] == b.queries[0]:
        return Block((a.queries[0], b.queries[1]), a.keys, Order.ALL)
    return None


def _joined_squares(square: Block, below: Block, corner: Block) -> Block | None:
    """A causal square, what the next queries see of its keys (all), and their own square: a larger square."""
    if (square.order, below.order, corner.order) != (Order.CAUSAL, Order.ALL, Order.CAUSAL):
        return None
    fits_queries = square.queries[1] == below.queries[0] and below.queries == corner.queries
    fits_keys = square.keys == below.keys and below.keys[1] == corner.keys[0]
    if not (fits_queries and fits_keys):
        return None
    return Block((square.queries[0], corner.queries[1]), (square.keys[0], corner.keys[1]), Order.CAUSAL)
