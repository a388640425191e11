"""Attention written out: softmax(q kᵀ / sqrt(d)) v, with the s x s scores in memory (arXiv:1706.03762,
section 3.2.1).

s sequence (sq of queries, sk of keys), b microbatch, a heads, g query groups, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.fusions.dropout import dropout
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention_masks import hidden_keys
from megatron.core.transformer.core_attention import CoreAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import attention_mask_func


class DotProductAttention(CoreAttention):
    """Explicit scores: takes any mask and bias, and shows what it does (Korthikanti et al., arXiv:2205.05198,
    figure 3).

    query [sq, b, a/tp, d], key and value [sk, b, g/tp, d] -> [sq, b, a/tp * d].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout,
            softmax_scale,
            cp_comm_type,
            model_comm_pgs,
        )
        # q kᵀ of fp16 overflows less when it is divided by the layer number; the softmax, in fp32, multiplies
        # it back.
        coefficient = max(1, layer_number) if config.apply_query_key_layer_scaling else None
        self.score_scale = self.softmax_scale / (coefficient or 1)
        self.scale_mask_softmax = FusedScaleMaskSoftmax(
            input_in_fp16=config.fp16,
            input_in_bf16=config.bf16,
            attn_mask_type=AttnMaskType.arbitrary,  # the mask it is given says everything
            scaled_masked_softmax_fusion=config.masked_softmax_fusion,
            mask_func=attention_mask_func,
            softmax_in_fp32=config.attention_softmax_in_fp32,
            scale=coefficient,
        )

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
        """Context [sq, b, a/tp * d]; see `CoreAttention.forward`."""
        sq, b, a, d = query.shape
        mask_type = attn_mask_type or self.attn_mask_type
        hidden = hidden_keys(mask_type, attention_mask, self.window_size, packed_seq_params, query, key)
        if key.size(2) != a:
            key, value = (x.repeat_interleave(a // x.size(2), dim=2) for x in (key, value))
        q, k, v = (x.flatten(1, 2).transpose(0, 1) for x in (query, key, value))  # [b * a, s, d]
        scores = torch.bmm(q * self.score_scale, k.transpose(1, 2)).view(b, a, sq, -1)
        if attention_bias is not None:
            scores = scores + attention_bias
        probs = self.scale_mask_softmax(scores, hidden)
        with self.dropout_rng():
            probs = dropout(probs, self.attention_dropout, self.training)
        context = torch.bmm(probs.flatten(0, 1), v).view(b, a, sq, -1)
        if attention_mask is not None and hidden is not None:
            # A query that sees no key gets nothing, as from the other cores and from keys spread over ranks.
            context = context.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        return context.permute(2, 0, 1, 3).reshape(sq, b, -1)
