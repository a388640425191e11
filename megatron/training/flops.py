"""Floating point operations of a training step (model FLOPs: forward and backward, causal attention counted half)."""

from __future__ import annotations

from typing import Any


def num_floating_point_operations(args: Any, batch_size: int) -> float:
    """FLOPs of one global batch of a dense transformer (Narayanan et al., arXiv:2104.04473, appendix; with grouped
    queries, gated MLPs and head widths of their own).

    Per token and layer: projections 2·params multiply-adds each in forward, twice that in backward; attention
    scores and their product with the values s·(heads × width) each, halved for causality.
    """
    hidden, layers, seq = args.hidden_size, args.num_layers, args.seq_length
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    projection_ratio = args.kv_channels * heads / hidden
    gated = 1.5 if args.swiglu else 1.0
    attention = 12 * layers * hidden**2 * (1 + groups / heads + seq / (2 * hidden)) * projection_ratio
    mlp = 12 * hidden * args.ffn_hidden_size * gated * layers
    logits = 6 * hidden * args.padded_vocab_size
    return batch_size * seq * (attention + mlp + logits)
