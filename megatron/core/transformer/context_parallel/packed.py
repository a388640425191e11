"""The layout of a micro-batch's samples, from the description of the sequences packed in them."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.context_parallel.layout import SequenceLayout, checked, positions, uniform_layout


def sequence_layout(packed: PackedSeqParams | None, length: int, num_samples: int, size: int) -> SequenceLayout:
    """How `num_samples` samples of `length` tokens lie on `size` ranks.

    Raises:
        ValueError: sequences cannot be cut, or do not add up to the samples.
    """
    if packed is None:
        return uniform_layout(length, size)
    key = (length, num_samples, size)
    if key not in packed.layouts:
        documents = _by_sample(packed.document_borders(), length, num_samples)
        whole = ((0, length),)
        pieces = whole if packed.is_cut_by_sample else _by_sample(packed.sequence_borders(), length, num_samples)
        packed.layouts[key] = checked(SequenceLayout(length, size, pieces, documents))
    return packed.layouts[key]


def places_in_documents(packed: PackedSeqParams, num_tokens: int, num_samples: int, size: int, rank: int) -> Tensor:
    """int64 [num_tokens, num_samples]: how far behind the start of its document each token of this rank stands.

    Args:
        num_tokens: tokens of a sample that the rank holds, 1/size of all.
    """
    key = ("places", num_tokens, num_samples, size, rank)
    if key not in packed.layouts:
        layout = sequence_layout(packed, num_tokens * size, num_samples, size)
        columns = []
        for row in range(layout.num_rows):
            (borders,) = layout.row(row).documents
            columns.append([p - borders[bisect_right(borders, p) - 1] for p in positions(layout.row(row), rank)])
        device = packed.document_starts().device
        packed.layouts[key] = torch.tensor(columns, device=device).t().expand(num_tokens, num_samples)
    return packed.layouts[key]


def _by_sample(borders: list[int], length: int, num_samples: int) -> tuple[tuple[int, ...], ...]:
    """Borders on the flattened token axis, as borders within each sample.

    Raises:
        ValueError: they do not run from 0 to the number of tokens, or one crosses from a sample to the next.
    """
    if borders[0] != 0 or borders[-1] != num_samples * length:
        raise ValueError(
            f"packed_seq_params must describe the {num_samples * length} tokens of the whole micro-batch "
            f"({num_samples} x {length}), got borders from {borders[0]} to {borders[-1]}"
        )
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    for border in borders[:-1]:
        samples[border // length].append(border % length)
    for number, sample in enumerate(samples):
        if not sample or sample[0] != 0:
            raise ValueError(f"a packed sequence crosses the border between samples {number - 1} and {number}")
    found = tuple((*sample, length) for sample in samples)
    return found[:1] if len(set(found)) == 1 else found
