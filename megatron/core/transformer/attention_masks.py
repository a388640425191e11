"""Which keys a query may not see. s sequence (sq of queries, sk of keys), b microbatch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import get_sliding_window_mask

Window = tuple[int, int]
UNLIMITED: Window = (-1, -1)


def effective_window(window_size: Window | None, mask_type: AttnMaskType, sq: int, sk: int) -> Window:
    """Distances (left, right) that a query sees; -1 where the sequence ends before the limit does.

    Causal attention is a window that ends at the query itself.
    """
    left, right = window_size or UNLIMITED
    if mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal):
        right = 0
    return (-1 if left >= sk - 1 else left, -1 if right >= sq - 1 and sq > 1 else right)


def hidden_keys(
    mask_type: AttnMaskType,
    attention_mask: Tensor | None,
    window_size: Window | None,
    packed_seq_params: PackedSeqParams | None,
    query: Tensor,
    key: Tensor,
) -> Tensor | None:
    """A mask that is True where a key is hidden and broadcasts to [b, a, sq, sk]; None where all keys are
    seen.

    An explicit mask of causal attention says everything (it contains the causal one, and more, such as
    documents); of padding attention it hides padding, to which the causal order is added for
    `padding_causal`.

    Args:
        attention_mask: [b, 1, sq, sk] or what broadcasts to it.
        packed_seq_params: sequences that do not see each other.
        query: [sq, b, ...].
        key: [sk, b, ...].
    """
    sq, sk = query.size(0), key.size(0)
    if mask_type == AttnMaskType.no_mask:
        attention_mask = None
    order = AttnMaskType.no_mask if mask_type == AttnMaskType.causal and attention_mask is not None else mask_type
    parts = [attention_mask] if attention_mask is not None else []
    window = effective_window(window_size, order, sq, sk)
    if window != UNLIMITED and not (sq == 1 and window[0] < 0):
        parts.append(get_sliding_window_mask(sq, sk, window, query.device))
    if packed_seq_params is not None:
        parts.append(other_sequences(packed_seq_params, sq, query.size(1)))
    if not parts:
        return None
    hidden = parts[0]
    for part in parts[1:]:
        hidden = hidden | part
    return hidden


def other_sequences(packed_seq_params: PackedSeqParams, s: int, b: int) -> Tensor:
    """[b, 1, s, s], True between tokens of different packed sequences."""
    starts = packed_seq_params.document_starts()
    tokens = torch.arange(b * s, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts, tokens, right=True).view(b, 1, s)
    return sequence.unsqueeze(-1) != sequence.unsqueeze(-2)


def segment_lengths(packed_seq_params: PackedSeqParams, num_tokens: int) -> list[int]:
    """Lengths of the packed sequences, in order.

    Raises:
        ValueError: they do not add up to the number of tokens.
    """
    borders = packed_seq_params.document_borders()
    if borders[0] != 0 or borders[-1] != num_tokens:
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q must run from 0 to the {num_tokens} tokens of the micro-batch, "
            f"got {borders[0]} ... {borders[-1]}"
        )
    return [stop - start for start, stop in zip(borders, borders[1:]) if stop > start]
