"""Floating point operations of a training step (model FLOPs: forward and backward, causal attention counted half)."""

from __future__ import annotations

from typing import Any

from megatron.core.export.weights import is_gated
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols
from megatron.training.rules.hybrid import layers_of, sizes_of


def num_moe_layers(args: Any) -> int:
    """Layers with experts: every n-th from the first, or as many as a list names; modules that predict further tokens
    are like the last layer."""
    if not args.num_experts:
        return 0
    if _is_mamba(args):
        return layers_of(args).count(Symbols.MOE)
    freq, last = args.moe_layer_freq, args.num_layers - 1
    further = (args.mtp_num_layers or 0) * bool(freq[last] if isinstance(freq, list) else last % freq == 0)
    return further + (sum(freq) if isinstance(freq, list) else len(range(0, args.num_layers, freq)))


def feed_forward_width(args: Any, num_experts: int) -> int:
    """Inner widths of all feed-forward blocks together, with `num_experts` of each layer's experts."""
    sparse = num_moe_layers(args)
    width = args.ffn_hidden_size * (args.num_layers + (args.mtp_num_layers or 0) - sparse)
    if sparse:
        width += sparse * (args.moe_ffn_hidden_size * num_experts + (args.moe_shared_expert_intermediate_size or 0))
    return width


def num_floating_point_operations(args: Any, batch_size: int, whole_attention: bool = False) -> float:
    """FLOPs of one global batch (Narayanan et al., arXiv:2104.04473, appendix; with grouped queries, gated MLPs,
    head widths of their own and, in layers with experts, those that a token sees).

    Per token and layer: projections 2·params multiply-adds each in forward, twice that in backward; attention
    scores and their product with the values s·(heads × width) each, halved for causality.

    Args:
        whole_attention: count causal attention as if each token saw all others, as some publications do.
    """
    if whole_attention:
        return num_floating_point_operations(args, batch_size) + batch_size * _left_out_by_causality(args)
    of_family = _OF_FAMILY.get(getattr(args, "model_family", None) or "gpt")
    if of_family is not None:
        return batch_size * of_family(args)
    hidden, seq, further = args.hidden_size, args.seq_length, args.mtp_num_layers or 0
    layers, gated = args.num_layers + further, 1.5 if is_gated(vars(args)) else 1.0
    products = _scores_and_context(args) * seq / 2
    attention = 6 * layers * (attention_parameters(args) + products)
    mlp = 12 * hidden * feed_forward_width(args, args.moe_router_topk) * gated
    join = 6 * further * (3 * hidden + 2 * hidden**2)  # norms, and the projection of embedding and hidden state
    logits = 6 * hidden * args.padded_vocab_size * (further + 1)
    return batch_size * seq * (attention + mlp + join + logits)


def attention_parameters(args: Any) -> float:
    """Weights of a layer's attention, norms of latents included."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    if not args.multi_latent_attention:
        groups = args.num_query_groups if args.group_query_attention else heads
        return 2 * hidden * args.kv_channels * heads * (1 + groups / heads)
    plain, rotating, values = args.qk_head_dim, args.qk_pos_emb_head_dim, args.v_head_dim
    queries = heads * (plain + rotating)
    of_queries = hidden * queries if args.q_lora_rank is None else args.q_lora_rank * (hidden + queries + 1)
    of_keys = args.kv_lora_rank * (hidden + heads * (plain + values) + 1) + hidden * rotating
    return of_queries + of_keys + heads * values * hidden


def _scores_and_context(args: Any) -> float:
    """Widths of the products of a query with the keys, and of the probabilities with the values, all heads together."""
    heads = args.num_attention_heads
    if not args.multi_latent_attention:
        return 2 * args.kv_channels * heads
    return heads * (args.qk_head_dim + args.qk_pos_emb_head_dim + args.v_head_dim)


def _left_out_by_causality(args: Any) -> float:
    """FLOPs of one sample with which no query of a causal layer attends to what comes later: as many as it needs."""
    family = getattr(args, "model_family", None) or "gpt"
    if family == "ict":  # counted whole
        return 0.0
    width = args.kv_channels * args.num_attention_heads
    if family == "t5":
        return 6.0 * args.decoder_num_layers * args.decoder_seq_length**2 * width
    if family == "mamba":
        return 6.0 * layers_of(args).count(Symbols.ATTENTION) * args.seq_length**2 * width
    layers = args.num_layers + (args.mtp_num_layers or 0)
    return 3.0 * layers * _scores_and_context(args) * args.seq_length**2


def _encoder_decoder_operations(args: Any) -> float:
    """FLOPs of one sample of a T5; its encoder's scores and its cross attention's count whole."""
    hidden, width = args.hidden_size, args.kv_channels * args.num_attention_heads
    encoder, decoder = args.encoder_seq_length, args.decoder_seq_length
    projection = 6 * hidden * width  # one of query, key, value and output, for one token
    mlp = 12 * hidden * args.ffn_hidden_size * (1.5 if is_gated(vars(args)) else 1.0)
    encoder_layer = encoder * (4 * projection + 12 * encoder * width + mlp)
    self_attention = decoder * (4 * projection + 6 * decoder * width)
    cross_attention = 2 * projection * (encoder + decoder) + 12 * decoder * encoder * width
    decoder_layer = self_attention + cross_attention + decoder * mlp
    logits = 6 * hidden * args.padded_vocab_size * decoder
    return args.encoder_num_layers * encoder_layer + args.decoder_num_layers * decoder_layer + logits


def _is_mamba(args: Any) -> bool:
    return getattr(args, "model_family", None) == "mamba"


def _hybrid_operations(args: Any) -> float:
    """FLOPs of one sample of a model with state space layers, layer by layer of its pattern.

    A mixer costs its two projections and, for the recurrence itself, 7 operations for each channel, state and token;
    chunks and their products of matrices are an implementation's matter.
    """
    layers, seq, hidden = layers_of(args), args.seq_length, args.hidden_size
    width = args.kv_channels * args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    attention = 4 * width * (hidden + hidden * groups / args.num_attention_heads + seq / 2)
    gated = 1.5 if is_gated(vars(args)) else 1.0
    mlp = 4 * hidden * args.ffn_hidden_size * gated
    experts = 4 * hidden * gated * feed_forward_width_of_experts(args)
    sizes = sizes_of(args)
    mixer = 2 * hidden * (sum(sizes.parts_of_projection) + sizes.inner) + 7 * sizes.inner * sizes.state
    costs = {Symbols.ATTENTION: attention, Symbols.MLP: mlp, Symbols.MOE: experts, Symbols.MAMBA: mixer}
    logits = 2 * hidden * args.padded_vocab_size
    return 3.0 * seq * (sum(costs[symbol] for symbol in layers) + logits)


def feed_forward_width_of_experts(args: Any) -> int:
    """Inner widths of the experts of one layer that a token sees, together."""
    if not args.num_experts:
        return 0
    shared: int = args.moe_shared_expert_intermediate_size or 0
    return int(args.moe_ffn_hidden_size * args.moe_router_topk + shared)


def _two_encoder_operations(args: Any) -> float:
    """FLOPs of one query and its passage, each as long as a sequence; there are no logits, and attention counts
    whole."""
    hidden, width, seq = args.hidden_size, args.kv_channels * args.num_attention_heads, args.seq_length
    mlp = 12 * hidden * args.ffn_hidden_size * (1.5 if is_gated(vars(args)) else 1.0)
    return 2 * args.num_layers * seq * (24 * hidden * width + 12 * seq * width + mlp)


_OF_FAMILY = {"t5": _encoder_decoder_operations, "mamba": _hybrid_operations, "ict": _two_encoder_operations}
"""Model family -> FLOPs of one sample, where it is not that of a decoder."""
