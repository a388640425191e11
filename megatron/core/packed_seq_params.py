"""Boundaries of the sequences that are packed one behind the other on the token axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class PackedSeqParams:
    """Where packed sequences begin and end; attention does not cross these borders.

    The token axis is the micro-batch `[b, s]` flattened, so a border always lies at each multiple of `s`.
    Activations keep their shape `[s, b, ...]`; with `b == 1` this is the usual "thd" form of one long row of
    tokens.
    """

    qkv_format: str | None = None
    """`"thd"`: tokens of all sequences on one axis. Other formats need no description."""
    cu_seqlens_q: Tensor | None = None
    """int32 [number of sequences + 1], starts of the query sequences and the total at the end: 0, l0, l0 +
    l1, ..."""
    cu_seqlens_kv: Tensor | None = None
    """The same for keys and values; equal to `cu_seqlens_q` in self attention."""
    cu_seqlens_q_padded: Tensor | None = None
    """Starts including padding behind each sequence, where there is any. Padding sees only itself."""
    cu_seqlens_kv_padded: Tensor | None = None
    """The same for keys and values."""
    max_seqlen_q: Tensor | int | None = None
    """Length of the longest query sequence."""
    max_seqlen_kv: Tensor | int | None = None
    """Length of the longest key sequence."""
    is_cut_by_sample: bool = False
    """How context parallel ranks share the tokens: each whole sample is cut in zigzag, wherever its sequences begin;
    False: each sequence is cut by itself, for which its (padded) length divides by 2·cp."""
    layouts: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What has been derived from the borders, kept from layer to layer."""

    @classmethod
    def from_documents(cls, tokens: Tensor, end_of_document: int) -> PackedSeqParams:
        """Borders of the documents in `tokens` [b, s], each of which ends with the token `end_of_document`.

        A sample begins a new document, too.
        """
        begins = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
        begins[1:] = (tokens == end_of_document).flatten()
        begins[:: tokens.size(1)] = True  # every sample, and the end of the last one
        starts = begins.nonzero().flatten().to(torch.int32)
        longest = int(starts.diff().max())
        return cls("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest, is_cut_by_sample=True)

    def document_starts(self) -> Tensor:
        """Where tokens begin that see each other, and the total: sequences, and the padding behind each."""
        starts, padded = self.cu_seqlens_q, self.cu_seqlens_q_padded
        assert starts is not None
        if padded is None:
            return starts
        if "starts" not in self.layouts:
            ends = padded[:-1] + starts.diff()
            self.layouts["starts"] = torch.cat((padded, ends)).unique()
        return self.layouts["starts"]

    def document_borders(self) -> list[int]:
        """`document_starts` as numbers; waits for the device once."""
        if "borders" not in self.layouts:
            self.layouts["borders"] = self.document_starts().tolist()
        return self.layouts["borders"]

    def sequence_borders(self) -> list[int]:
        """Starts of the sequences with their padding, and the total."""
        padded = self.cu_seqlens_q_padded
        return self.document_borders() if padded is None else padded.tolist()
