"""Chunks that texts with the same beginning share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.inference.contexts.dynamic_chunk_allocator import ChunkAllocator

ROOT = 0
"""Number of the empty beginning."""


@dataclass(frozen=True)
class Beginning:
    """A text's first tokens, up to the end of a chunk."""

    number: int
    """Never used again: what comes after a forgotten beginning is never found."""
    chunk: int
    key: tuple[int, tuple[int, ...]]


class PrefixCache:
    """Which chunk holds the keys and values of which beginning of a text.

    It holds those chunks itself, and gives them up, the longest unused first, when room is needed.

    A beginning is known by the one before it and the tokens of its last chunk: by all its tokens, not by a hash of
    them.
    """

    def __init__(self, allocator: ChunkAllocator, chunk_size: int, enabled: bool = True) -> None:
        self.allocator, self.chunk_size, self.enabled = allocator, chunk_size, enabled
        self.reset()

    def reset(self) -> None:
        """Know nothing; the chunks are not given back."""
        self._known: OrderedDict[tuple[int, tuple[int, ...]], Beginning] = OrderedDict()
        self._next = ROOT + 1

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """(chunks, number) of the longest known beginning of `tokens`; the caller holds these chunks from now on."""
        chunks: list[int] = []
        number, size = ROOT, self.chunk_size
        while self.enabled and (len(chunks) + 1) * size <= len(tokens):
            known = self._known.get((number, tuple(tokens[len(chunks) * size : (len(chunks) + 1) * size])))
            if known is None:
                break
            self._known.move_to_end(known.key)
            self.allocator.share(known.chunk)
            chunks.append(known.chunk)
            number = known.number
        return chunks, number

    def remember(self, number: int, tokens: Sequence[int], chunk: int) -> int:
        """The number of the beginning `number` extended by the tokens of one full chunk, which is kept unless known."""
        key = (number, tuple(tokens))
        known = self._known.get(key)
        if known is None:
            known = Beginning(self._next, chunk, key)
            self._next += 1
            if self.enabled:
                self._known[key] = known
                self.allocator.share(chunk)
        return known.number

    @property
    def num_spare(self) -> int:
        """Chunks that nobody but the cache holds."""
        return sum(self.allocator.holders(known.chunk) == 1 for known in self._known.values())

    def make_room(self, num_chunks: int) -> None:
        """Give up chunks until as many are free, or none is left that only the cache holds."""
        for key, known in list(self._known.items()):
            if self.allocator.chunk_count_avail >= num_chunks:
                return
            if self.allocator.holders(known.chunk) == 1:
                del self._known[key]
                self.allocator.drop([known.chunk])

    def forget(self) -> None:
        """Give up all chunks."""
        self.allocator.drop([known.chunk for known in self._known.values()])
        self.reset()
