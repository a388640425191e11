"""Which tokens of which texts a pass of the model computes. t tokens of the pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from megatron.core.inference.contexts.paged_attention import ChunkTable, chunk_table
from megatron.core.inference.contexts.prefix_cache import ROOT


@dataclass
class CachedSequence:
    """A text that the context knows: its tokens, and for how many of them keys and values are kept."""

    request_id: int
    tokens: list[int]
    max_length: int
    slot: int
    """Its place in buffers that have one row for each text, such as those of recurrent states."""
    wants_all_logits: bool = False
    num_cached: int = 0
    chunks: list[int] = field(default_factory=list)
    num_full: int = 0
    """Chunks that the prefix cache was told of."""
    beginning: int = ROOT
    """The prefix cache's number of their tokens."""


@dataclass(frozen=True)
class Part:
    """The tokens `start` to `stop` - 1 of one text."""

    sequence: CachedSequence
    start: int
    stop: int

    @property
    def is_drawn(self) -> bool:
        """The pass ends at the text's last token: a new one is drawn."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True)
class Pieces:
    """Where the texts of a pass lie in it, and in buffers that have one row, a slot, for each text."""

    single: Tensor
    """[n] int64: slots of the texts with one token in the pass, which are its first n tokens."""
    several: list[tuple[int, int, int]]
    """(begin, end, slot) of the others."""
    fresh: Tensor
    """int64: slots of the texts whose first token is in the pass."""


class StepPlan:
    """Parts of one pass, those of a single token first, on one row of t tokens.

    Args:
        token_multiple: t is a multiple of this; tokens that fill up belong to nobody.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        chunk_size: int,
        dummy_chunk: int,
        *,
        token_multiple: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.parts = sorted(parts, key=lambda part: part.stop - part.start > 1)
        self.chunk_size, self.device = chunk_size, device or torch.device("cpu")
        self.num_single = sum(part.stop - part.start == 1 for part in parts)
        self.num_tokens = sum(part.stop - part.start for part in parts)
        self.num_padded = -(-self.num_tokens // token_multiple) * token_multiple
        padding = self.num_padded - self.num_tokens
        ids: list[int] = []
        positions: list[int] = []
        chunks: list[int] = []
        for part in self.parts:
            places = range(part.start, part.stop)
            ids += part.sequence.tokens[part.start : part.stop]
            positions += places
            chunks += [part.sequence.chunks[place // chunk_size] for place in places]
        self.input_ids = self._row(ids + [0] * padding)
        self.position_ids = self._row(positions + [0] * padding)
        self.chunk_of_token = torch.tensor(chunks + [dummy_chunk] * padding, device=self.device)
        self.offset_in_chunk = self.position_ids[0] % chunk_size
        self._tables: dict[int | None, ChunkTable] = {}
        self._pieces: Pieces | None = None

    def _row(self, values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=self.device)

    @property
    def drawn(self) -> list[Part]:
        """Parts that a new token is drawn for, in the order of the rows of logits."""
        return [part for part in self.parts if part.is_drawn]

    def wanted(self) -> list[list[int]]:
        """For each part, the positions [of the pass] whose logits are wanted."""
        found, begin = [], 0
        for part in self.parts:
            end = begin + part.stop - part.start
            if part.sequence.wants_all_logits:
                found.append(list(range(begin, end)))
            else:
                found.append([end - 1] if part.is_drawn else [])
            begin = end
        return found

    def output_positions(self) -> Tensor:
        """[1, t] bool: the union of `wanted`."""
        mask = torch.zeros(1, self.num_padded, dtype=torch.bool, device=self.device)
        mask[0, [place for own in self.wanted() for place in own]] = True
        return mask

    def table(self, window: int | None) -> ChunkTable:
        """What the parts of a single token look at."""
        if window not in self._tables:
            single = self.parts[: self.num_single]
            self._tables[window] = chunk_table(
                [part.sequence.chunks for part in single],
                [part.stop for part in single],
                self.chunk_size,
                window,
                self.device,
            )
        return self._tables[window]

    def pieces(self) -> Pieces:
        """For layers that keep states of texts instead of something of each token."""
        if self._pieces is None:
            slots = [part.sequence.slot for part in self.parts]
            ends = list(accumulate(part.stop - part.start for part in self.parts))
            several = [(ends[i - 1] if i else 0, ends[i], slots[i]) for i in range(self.num_single, len(slots))]
            fresh = [part.sequence.slot for part in self.parts if part.start == 0]
            single, first = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in (slots, fresh))
            self._pieces = Pieces(single[: self.num_single], several, first)
        return self._pieces
