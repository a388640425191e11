"""Which chunks of the cache are whose."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


class ChunkAllocator:
    """Numbers of free chunks, and how many texts hold each of the others.

    The lowest free numbers are given first, so that those in use lie close together.

    Args:
        chunk_count_total: chunks in all; the last is nobody's, for tokens that only fill up a batch.
        gtd_chunk_count: chunks that a new request leaves free for those that run.
    """

    def __init__(self, chunk_count_total: int, gtd_chunk_count: int) -> None:
        if chunk_count_total < 2:
            raise ValueError(f"{chunk_count_total} chunks: at least two are needed, one of them for padding")
        self.chunk_count_total, self.gtd_chunk_count = chunk_count_total, gtd_chunk_count
        self.dummy_chunk_idx = chunk_count_total - 1
        self.reset()

    @property
    def chunk_count_avail(self) -> int:
        """Free chunks."""
        return len(self._free)

    def is_memory_available(self, num_chunks: int, safe: bool = False) -> bool:
        """Whether there are this many free chunks; `safe`: besides the guaranteed ones."""
        return num_chunks + (self.gtd_chunk_count if safe else 0) <= len(self._free)

    def allocate_memory_chunks(self, num_chunks: int = 1, safe: bool = False) -> Tensor | None:
        """[num_chunks] int64: chunks that were free; None if there are not as many."""
        taken = self.take(num_chunks, safe)
        return None if taken is None else torch.tensor(taken, dtype=torch.int64)

    def release_memory_chunks(self, chunks: Tensor) -> None:
        """They are needed once less."""
        self.drop(chunks.tolist())

    def take(self, num_chunks: int, safe: bool = False) -> list[int] | None:
        """Like `allocate_memory_chunks`."""
        if not self.is_memory_available(num_chunks, safe):
            return None
        taken = [heapq.heappop(self._free) for _ in range(num_chunks)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, chunk: int) -> None:
        """One more holds a chunk that is in use."""
        self._holders[chunk] += 1

    def holders(self, chunk: int) -> int:
        """How many hold a chunk."""
        return self._holders.get(chunk, 0)

    def drop(self, chunks: list[int]) -> None:
        """One less holds each of them; what nobody holds is free.

        Raises:
            KeyError: a chunk is free already.
        """
        for chunk in chunks:
            self._holders[chunk] -= 1
            if not self._holders[chunk]:
                del self._holders[chunk]
                heapq.heappush(self._free, chunk)

    def reset(self) -> None:
        """All are free."""
        self._free = list(range(self.dummy_chunk_idx))
        self._holders: dict[int, int] = {}
