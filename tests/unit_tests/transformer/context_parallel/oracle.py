"""Attention in fp64 on one process, and micro-batches to compare with it. s tokens, b samples, a heads, g groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

S, B, A, D = 32, 2, 4, 8


@dataclass
class Case:
    """A way of masking, and what it hides: [b or 1, 1, s, s] bool."""

    hidden: Tensor
    mask_type: AttnMaskType = AttnMaskType.causal
    packed: PackedSeqParams | None = None
    mask: Tensor | None = None
    window: tuple[int, int] | None = None


def later() -> Tensor:
    """Keys behind the query."""
    return torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)


def outside(left: int, right: int) -> Tensor:
    """Keys outside of a window."""
    gap = torch.arange(S)[:, None] - torch.arange(S)[None, :]
    return ((gap > left) | (gap < -right))[None, None]


def others(borders: list[int]) -> Tensor:
    """Keys of other sequences."""
    number = torch.searchsorted(torch.tensor(borders), torch.arange(B * S), right=True).view(B, 1, S)
    return number.unsqueeze(-1) != number.unsqueeze(-2)


def packing(borders: list[int], *, by_sample: bool = False, padded: list[int] | None = None) -> PackedSeqParams:
    starts = torch.tensor(borders, dtype=torch.int32)
    places = None if padded is None else torch.tensor(padded, dtype=torch.int32)
    return PackedSeqParams(
        "thd", starts, starts, cu_seqlens_q_padded=places, cu_seqlens_kv_padded=places, is_cut_by_sample=by_sample
    )


def cases() -> dict[str, Case]:
    """Each way of masking; the mask with rows that see nothing hides all from the early half of the sample."""
    anywhere, by_sequence = [0, 3, 4, 20, 32, 33, 50, 64], [0, 8, 32, 48, 64]
    padded, lengths_with_padding, padding = [0, 5, 26, 42, 51], [0, 8, 32, 48, 64], [0, 5, 8, 29, 32, 48, 57, 64]
    generator = torch.Generator().manual_seed(5)
    explicit = torch.rand(B, 1, S, S, generator=generator) < 0.4
    explicit[..., 0] = False  # each query sees something
    empty_rows = explicit.clone()
    empty_rows[:, :, : S // 4] = True
    empty_rows[:, :, 3 * S // 4 :] = True  # the tokens of the first of two ranks
    padding_mask = torch.zeros(B, 1, 1, S, dtype=torch.bool)
    padding_mask[1, ..., 20:] = True
    return {
        "causal": Case(later()),
        "full": Case(torch.zeros(1, 1, S, S, dtype=torch.bool), AttnMaskType.no_mask),
        "documents": Case(later() | others(anywhere), packed=packing(anywhere, by_sample=True)),
        "sequences": Case(later() | others(by_sequence), packed=packing(by_sequence)),
        "sequences without order": Case(others(by_sequence), AttnMaskType.no_mask, packing(by_sequence)),
        "padded sequences": Case(later() | others(padding), packed=packing(padded, padded=lengths_with_padding)),
        "explicit": Case(explicit, AttnMaskType.arbitrary, mask=explicit),
        "explicit causal": Case(explicit | later(), AttnMaskType.padding_causal, mask=explicit),
        "explicit within documents": Case(
            explicit | others(anywhere), AttnMaskType.arbitrary, packing(anywhere, by_sample=True), explicit
        ),
        "padding": Case(padding_mask, AttnMaskType.padding, mask=padding_mask),
        "window": Case(later() | outside(5, 0), window=(5, 0)),
        "window in documents": Case(
            outside(6, 2) | others(anywhere), AttnMaskType.no_mask, packing(anywhere, by_sample=True), None, (6, 2)
        ),
        "rows that see nothing": Case(empty_rows, AttnMaskType.arbitrary, mask=empty_rows),
    }


def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """[s, b, a, d] of q [s, b, a, d] and k, v [s, b, g, d]; 0 for a query that sees nothing."""
    repeat = q.size(2) // k.size(2)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    empty = hidden.all(-1, keepdim=True)
    probs = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return (probs @ v).permute(2, 0, 1, 3)
