"""Attention by fused CUDA kernels for packed sequences and sliding windows, where they fit; else as
`SDPAttention`.

s sequence, b microbatch, a heads, g query groups, d head width, n = b * s tokens.
"""

from __future__ import annotations

from torch import Tensor

from megatron.core.extensions.flash_attention import can_flash_attend, flash_attention, flash_attention_packed
from megatron.core.extensions.varlen_attention import can_varlen_attend, varlen_attention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention_masks import effective_window
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.sdpa_attention import SDPAttention


class FlashAttention(SDPAttention):
    """Kernels of the `flash-attn` package, and of torch for packed sequences; other cases go the way of the
    base.

    The kernels take half precision on CUDA, order masks (causal, window, packed), and no explicit mask or
    bias.
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
        has_mask = attention_mask is not None and mask_type != AttnMaskType.no_mask
        fits = can_flash_attend(query.dtype, query.device, query.size(-1))
        if packed_seq_params is not None or has_mask or attention_bias is not None or not fits:
            return super().forward(query, key, value, attention_mask, mask_type, attention_bias, packed_seq_params)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [b, s, a, d]
        left, right = effective_window(self.window_size, mask_type, query.size(0), key.size(0))
        with self.dropout_rng():
            context = flash_attention(
                q,
                k,
                v,
                dropout_p=self.dropout_p,
                scale=self.softmax_scale,
                is_causal=right == 0,
                window=(left, right),
            )
        return context.transpose(0, 1).flatten(2)

    def attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams,
    ) -> Tensor:
        """Each packed sequence by itself, all in one kernel."""
        s, b = query.shape[:2]
        window = effective_window(self.window_size, mask_type, s, s)
        use_torch = can_varlen_attend(query, window, self.dropout_p, query.size(2) != key.size(2))
        if not use_torch and not can_flash_attend(query.dtype, query.device, query.size(-1)):
            return super().attend_packed(query, key, value, mask_type, packed_seq_params)
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [n, a, d]
        starts = packed_seq_params.document_starts()
        # The longest sequence only sizes the launch: the whole sample is a safe bound, and costs no look at
        # the device.
        max_length = int(packed_seq_params.max_seqlen_q) if isinstance(packed_seq_params.max_seqlen_q, int) else s
        if use_torch:
            context = varlen_attention(
                q, k, v, starts=starts, max_length=max_length, scale=self.softmax_scale, window=window
            )
        else:
            with self.dropout_rng():
                context = flash_attention_packed(
                    q,
                    k,
                    v,
                    starts=starts,
                    max_length=max_length,
                    dropout_p=self.dropout_p,
                    scale=self.softmax_scale,
                    is_causal=window[1] == 0,
                    window=window,
                )
        return context.view(b, s, -1).transpose(0, 1)
