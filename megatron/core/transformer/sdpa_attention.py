"""Attention by torch's scaled_dot_product_attention, whose kernels keep no s x s matrix (arXiv:2205.14135).

s sequence, b microbatch, a heads, g query groups, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.core.device import to_computing_type
from megatron.core.fusions.biased_attention import biased_attention, computes_with_bias
from megatron.core.fusions.blocked_attention import Rules, blocked_attention, computes_here, suits_blocks
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention_masks import (
    UNLIMITED,
    effective_window,
    hidden_keys,
    segment_lengths,
)
from megatron.core.transformer.core_attention import CoreAttention
from megatron.core.transformer.enums import AttnMaskType

CAUSAL = (-1, 0)


class SDPAttention(CoreAttention):
    """The default core, on every device. Packed sequences are attended one by one, so they need no mask
    either.

    query [s, b, a/tp, d], key and value [s, b, g/tp, d] -> [s, b, a/tp * d].
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Context [s, b, a/tp * d]; see `CoreAttention.forward`."""
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None and attention_mask is None and attention_bias is None:
            return self.attend_packed(query, key, value, mask_type, packed_seq_params)
        hidden = None
        is_causal = self._is_plain_causal(mask_type, attention_mask, attention_bias, packed_seq_params, query, key)
        if not is_causal:
            hidden = hidden_keys(mask_type, attention_mask, self.window_size, packed_seq_params, query, key)
        if hidden is not None and hidden.device.type == "cpu" and not hidden.any():
            hidden = None  # to look is cheaper than what the kernels do with a mask
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, a, s, d], still in place
        if attention_bias is not None and self.dropout_p == 0.0 and computes_with_bias(q, k, v, attention_bias):
            context = biased_attention(q, k, v, attention_bias, hidden, self.softmax_scale)
        else:
            context = self.attend(q, k, v, _as_sdpa_mask(hidden, attention_bias), is_causal)
        return context.permute(2, 0, 1, 3).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """[b, a, s, d] of queries, keys, values in that layout; `mask` as torch wants it."""
        with self.dropout_rng():
            rules = self._blocked(q, v, mask, is_causal)
            if rules is not None:
                return blocked_attention(q, k, v, rules)
            context = scaled_dot_product_attention(
                to_computing_type(q),
                to_computing_type(k),
                to_computing_type(v),
                attn_mask=mask,
                dropout_p=self.dropout_p,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return context.to(q.dtype)

    def _blocked(self, q: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Rules | None:
        """How to attend by blocks, where torch's kernels are slower, or would keep the s x s probabilities: on a CPU
        they do so with dropout.
        """
        if self.dropout_p == 0.0:
            return Rules(self.softmax_scale) if is_causal and suits_blocks(q, v) else None
        if not computes_here(q, v) or (mask is not None and mask.dtype is not torch.bool):
            return None
        seed = int(torch.randint(2**62, ()))
        hidden = None if mask is None else ~mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
        return Rules(self.softmax_scale, is_causal, hidden, self.dropout_p, seed)

    def attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams,
    ) -> Tensor:
        """Each packed sequence by itself; their borders never cut across microbatch samples."""
        s, b = query.shape[:2]
        lengths = segment_lengths(packed_seq_params, b * s)
        # [a, b * s, d]: tokens of all samples in a row, cut at the borders
        rows = (x.permute(2, 1, 0, 3).flatten(1, 2).split(lengths, dim=1) for x in (query, key, value))
        contexts = [self._attend_segment(q, k, v, mask_type) for q, k, v in zip(*rows)]
        context = torch.cat(contexts)  # [b * s, a, d]
        return context.view(b, s, -1).transpose(0, 1)

    def _attend_segment(self, q: Tensor, k: Tensor, v: Tensor, mask_type: AttnMaskType) -> Tensor:
        """[a, l, d] -> [l, a, d]."""
        length = q.size(1)
        window = effective_window(self.window_size, mask_type, length, length)
        mask = None
        if window not in (CAUSAL, UNLIMITED):
            rows = q.transpose(0, 1)
            mask = _as_sdpa_mask(hidden_keys(mask_type, None, self.window_size, None, rows, rows), None)
        context = self.attend(q[None], k[None], v[None], mask, window == CAUSAL)
        return context[0].transpose(0, 1)

    def _is_plain_causal(
        self,
        mask_type: AttnMaskType,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        query: Tensor,
        key: Tensor,
    ) -> bool:
        """Whether the kernels' own causal mask says all there is to say."""
        sq, sk = query.size(0), key.size(0)
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            return False
        return sq == sk and sq > 1 and effective_window(self.window_size, mask_type, sq, sk) == CAUSAL


def _as_sdpa_mask(hidden: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """torch's mask: True where a key is seen, or numbers to add to the scores."""
    if bias is None:
        return None if hidden is None else ~hidden
    return bias if hidden is None else bias.masked_fill(hidden, -torch.inf)
