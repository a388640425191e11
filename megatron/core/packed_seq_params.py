"""Boundaries of the sequences that are packed one behind the other on the token axis."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Starts including padding between sequences, where there is any."""
    cu_seqlens_kv_padded: Tensor | None = None
    """The same for keys and values."""
    max_seqlen_q: Tensor | int | None = None
    """Length of the longest query sequence."""
    max_seqlen_kv: Tensor | int | None = None
    """Length of the longest key sequence."""

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
        return cls("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)
