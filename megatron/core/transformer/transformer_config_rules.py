"""What TransformerConfig derives and refuses, one function a rule; `TRANSFORMER_RULES` is their order.

The split of layers over pipeline stages and recompute have a file of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import gelu, silu

from megatron.core.config_rules import require, require_divisible, require_one_of, shown
from megatron.core.transformer.context_parallel_rules import CONTEXT_PARALLEL_RULES
from megatron.core.transformer.moe.balancing import LOSSES
from megatron.core.transformer.transformer_depth_rules import DEPTH_RULES
from megatron.core.utils import init_method_normal, scaled_init_method_normal

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


# --- precision ------------------------------------------------------------------------------------


def require_one_half_precision(config: TransformerConfig) -> None:
    """Weights have one type."""
    require(not (config.fp16 and config.bf16), "fp16 and bf16 exclude each other; choose one")


def set_bf16_matmul_precision(config: TransformerConfig) -> None:
    """torch keeps the accumulation precision of matrix products as a process-wide switch."""
    if config.bf16 and config.disable_bf16_reduced_precision_matmul:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def require_fp8_fits(config: TransformerConfig) -> None:
    """fp8 weights need fp8 products; layers kept in bfloat16 need scales that are chosen per layer."""
    if config.fp8_param:
        require(config.fp8, "fp8_param needs fp8 to be set")
        require(
            config.fp8_recipe in ("delayed", "tensorwise"),
            f"fp8_param does not work with {shown(config, 'fp8_recipe')}: ranks own ranges that cut through blocks; "
            "delayed and tensorwise have one scale a tensor",
        )
        require(
            config.gradient_accumulation_fusion,
            "fp8_param needs gradient_accumulation_fusion: autograd would round the weights' gradients to fp8",
        )
    if config.fp8:
        require_one_of(config, "fp8", ("e4m3", "hybrid"))
        require_one_of(config, "fp8_recipe", ("tensorwise", "delayed", "mxfp8", "blockwise"))
        require_one_of(config, "fp8_amax_compute_algo", ("most_recent", "max"))
        require(config.fp8_amax_history_len > 0, f"{shown(config, 'fp8_amax_history_len')} must be positive")
        require(
            not config.tp_comm_overlap,
            "fp8 does not work with tp_comm_overlap: pieces of a matrix have no common maximum yet",
        )
    if config.fp8 and config.first_last_layers_bf16:
        require(config.fp8_recipe != "delayed", "first_last_layers_bf16 does not work with fp8_recipe 'delayed'")
        per_stage = config.num_layers // config.pipeline_model_parallel_size
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            require(
                0 <= getattr(config, name) <= per_stage,
                f"{shown(config, name)} must be between 0 and the {per_stage} layers of a pipeline stage",
            )


# --- sizes ----------------------------------------------------------------------------------------


def require_heads_fit_tensor_parallel(config: TransformerConfig) -> None:
    """Each tensor parallel rank computes whole heads."""
    require_divisible(config, "num_attention_heads", by="tensor_model_parallel_size")


def derive_ffn_hidden_size(config: TransformerConfig) -> None:
    """The feed-forward block is four times as wide as the residual stream."""
    if config.ffn_hidden_size is None:
        config.ffn_hidden_size = 4 * config.hidden_size


def require_feed_forward_fits_tensor_parallel(config: TransformerConfig) -> None:
    """Each tensor parallel rank holds the same share of a dense layer's feed-forward block."""
    if config.ffn_hidden_size and config.num_moe_experts is None:
        require_divisible(config, "ffn_hidden_size", by="tensor_model_parallel_size")


def derive_kv_channels(config: TransformerConfig) -> None:
    """A head's width is its share of the hidden size."""
    if config.kv_channels is None and config.num_attention_heads:
        require_divisible(config, "hidden_size", by="num_attention_heads")
        config.kv_channels = config.hidden_size // config.num_attention_heads


def derive_num_query_groups(config: TransformerConfig) -> None:
    """Without grouping each query head has its own keys and values."""
    if config.num_query_groups is None:
        config.num_query_groups = config.num_attention_heads


def require_query_groups_fit(config: TransformerConfig) -> None:
    """Each rank holds whole groups, and groups are equal in size."""
    require_divisible(config, "num_query_groups", by="tensor_model_parallel_size")
    if config.num_query_groups:
        require_divisible(config, "num_attention_heads", by="num_query_groups")


def require_dropout_is_probability(config: TransformerConfig) -> None:
    """A dropout rate is a probability below one."""
    for name in ("hidden_dropout", "attention_dropout"):
        require(0.0 <= getattr(config, name) < 1.0, f"{shown(config, name)} must be at least 0 and below 1")


def require_valid_window(config: TransformerConfig) -> None:
    """A window is a pair of distances."""
    window = config.window_size
    if window is not None:
        require(
            len(window) == 2 and min(window) >= -1,
            f"{shown(config, 'window_size')} must be two distances, each at least -1 (no limit)",
        )


def require_known_normalization(config: TransformerConfig) -> None:
    """Two kinds of norm exist."""
    require_one_of(config, "normalization", ("LayerNorm", "RMSNorm"))


# --- attention and activation ---------------------------------------------------------------------


def force_fp32_softmax_under_layer_scaling(config: TransformerConfig) -> None:
    """Scores divided by the layer's number are scaled up again inside the softmax, beyond float16's range."""
    if config.apply_query_key_layer_scaling:
        config.attention_softmax_in_fp32 = True


def require_fusable_activation(config: TransformerConfig) -> None:
    """A fused bias and activation exists for gelu and silu."""
    if config.bias_activation_fusion:
        name = getattr(config.activation_func, "__name__", repr(config.activation_func))
        require(
            config.activation_func in (gelu, silu),
            f"bias_activation_fusion works with the activations gelu and silu, not with {name}",
        )
        if config.activation_func is gelu and not config.gated_linear_unit:
            require(config.add_bias_linear, "bias_activation_fusion with gelu needs add_bias_linear")


def require_swiglu_for_fp8_store(config: TransformerConfig) -> None:
    """Only the fused SwiGLU can keep its input in fp8."""
    if config.activation_func_fp8_input_store:
        require(
            config.activation_func is silu and config.gated_linear_unit,
            "activation_func_fp8_input_store works only with gated silu (SwiGLU)",
        )


def require_plain_rotation(config: TransformerConfig) -> None:
    """Latent attention and the fused rotation know the half-and-half layout only."""
    if config.rotary_interleaved:
        require(not config.multi_latent_attention, "rotary_interleaved does not work with multi_latent_attention")
        require(not config.apply_rope_fusion, "rotary_interleaved needs apply_rope_fusion to be off")


def derive_init_methods(config: TransformerConfig) -> None:
    """Weights are normal; those that add to the residual stream are smaller, for it sums over all layers."""
    if config.init_method is None:
        config.init_method = init_method_normal(config.init_method_std)
    if config.output_layer_init_method is None:
        multiplier = 1.0 if config.is_hybrid_model else 2.0
        config.output_layer_init_method = scaled_init_method_normal(
            config.init_method_std, max(config.num_layers, 1), multiplier=multiplier
        )


def expand_no_rope_freq(config: TransformerConfig) -> None:
    """A period n becomes the list of layers: the last of every n goes without rotary positions."""
    freq = config.no_rope_freq
    if freq is None:
        return
    require(not config.flash_decode, "no_rope_freq does not work with flash_decode")
    if isinstance(freq, int):
        require(
            freq > 0 and config.num_layers % freq == 0,
            f"{shown(config, 'num_layers')} must be divisible by {shown(config, 'no_rope_freq')}",
        )
        config.no_rope_freq = ([0] * (freq - 1) + [1]) * (config.num_layers // freq)
    else:
        require(
            len(freq) == config.num_layers,
            f"no_rope_freq lists {len(freq)} layers, {shown(config, 'num_layers')}",
        )


def require_yarn_for_fused_rope(config: MLATransformerConfig) -> None:
    """Latent attention's fused rotation exists for YaRN positions only."""
    if config.apply_rope_fusion:
        require(
            config.rope_type == "yarn",
            f"apply_rope_fusion needs rope_type 'yarn', found {config.rope_type!r}",
        )


def require_latents_fit(config: MLATransformerConfig) -> None:
    """Latents have a size, tensor parallel ranks equal parts of their projections, and every head has its own keys."""
    sizes = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rotary_scaling_factor")
    for name in (*sizes, *(() if config.q_lora_rank is None else ("q_lora_rank",))):
        require(getattr(config, name) > 0, f"{shown(config, name)} must be positive")
    require(config.qk_pos_emb_head_dim % 2 == 0, f"{shown(config, 'qk_pos_emb_head_dim')} must be even: pairs rotate")
    require_one_of(config, "rope_type", ("rope", "yarn"))
    if config.q_lora_rank is not None:
        require_divisible(config, "q_lora_rank", by="tensor_model_parallel_size")
    rows = config.kv_lora_rank + config.qk_pos_emb_head_dim
    require(
        rows % config.tensor_model_parallel_size == 0,
        f"{shown(config, 'kv_lora_rank')} plus {shown(config, 'qk_pos_emb_head_dim')} must be divisible by "
        f"{shown(config, 'tensor_model_parallel_size')}",
    )
    require(
        config.num_query_groups == config.num_attention_heads,
        f"multi_latent_attention has no groups of heads: {shown(config, 'num_query_groups', 'num_attention_heads')}; "
        "leave num_query_groups unset",
    )
    require(
        config.add_bias_linear or not config.add_qkv_bias,
        "multi_latent_attention has no biases of queries, keys and values; leave add_qkv_bias out",
    )


# --- mixture of experts ---------------------------------------------------------------------------


def require_experts_for_expert_parallel(config: TransformerConfig) -> None:
    """Expert parallelism splits experts, and a count of experts is positive."""
    if config.expert_model_parallel_size > 1:
        require(config.num_moe_experts, f"{shown(config, 'expert_model_parallel_size')} needs num_moe_experts")
    if config.num_moe_experts is not None:
        require(config.num_moe_experts > 0, f"{shown(config, 'num_moe_experts')} must be positive; unset is dense")


def derive_moe_ffn_hidden_size(config: TransformerConfig) -> None:
    """An expert is as wide as the dense feed-forward block; a dense model has no expert width."""
    if config.num_moe_experts is None:
        require(
            config.moe_ffn_hidden_size is None,
            f"{shown(config, 'moe_ffn_hidden_size')} needs num_moe_experts",
        )
    elif config.moe_ffn_hidden_size is None:
        config.moe_ffn_hidden_size = config.ffn_hidden_size
        warnings.warn(f"moe_ffn_hidden_size is not set; experts get {shown(config, 'ffn_hidden_size')}", stacklevel=2)


def require_dispatcher_fits(config: TransformerConfig) -> None:
    """Each way of moving tokens has its own limits."""
    dispatcher = config.moe_token_dispatcher_type
    needs = f"moe_token_dispatcher_type {{}}, found {dispatcher!r}"
    if config.num_moe_experts and dispatcher == "flex":
        raise NotImplementedError(
            f"{shown(config, 'moe_token_dispatcher_type')} is not built yet: it stands for the kernels of DeepEP; use "
            "'alltoall', which sends the same rows"
        )
    if config.moe_enable_deepep:
        require(dispatcher == "flex", "moe_enable_deepep needs " + needs.format("'flex'"))
    if config.moe_pad_expert_input_to_capacity:
        require(dispatcher != "flex", "moe_pad_expert_input_to_capacity does not work with dispatcher 'flex'")
    if config.moe_shared_expert_overlap:
        require(dispatcher == "alltoall", "moe_shared_expert_overlap needs " + needs.format("'alltoall'"))
    if config.variable_seq_lengths and config.num_moe_experts:
        require(dispatcher != "allgather", "variable_seq_lengths does not work with dispatcher 'allgather'")


def require_positive_shared_expert(config: TransformerConfig) -> None:
    """A shared expert has a width."""
    size = config.moe_shared_expert_intermediate_size
    require(size is None or size > 0, f"{shown(config, 'moe_shared_expert_intermediate_size')} must be positive")
    for name in ("moe_shared_expert_gate", "moe_shared_expert_overlap"):
        require(size or not getattr(config, name), f"{name} needs moe_shared_expert_intermediate_size")


def derive_capacity_factor(config: TransformerConfig) -> None:
    """A negative factor means no limit; a limit needs a way of balancing that leaves gaps."""
    factor = config.moe_expert_capacity_factor
    if factor is not None and factor < 0:
        config.moe_expert_capacity_factor = None
    if config.moe_expert_capacity_factor is not None:
        require(
            config.moe_router_load_balancing_type != "sinkhorn",
            "moe_expert_capacity_factor does not work with moe_router_load_balancing_type 'sinkhorn'; it can be "
            f"{', '.join(map(repr, (*LOSSES, 'none')))}",
        )
    if config.moe_pad_expert_input_to_capacity:
        require(
            config.moe_expert_capacity_factor is not None,
            "moe_pad_expert_input_to_capacity needs moe_expert_capacity_factor",
        )


def require_balancing_fits(config: TransformerConfig) -> None:
    """Several balancing losses differ, and each has its coefficient; a list of one is that one."""
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        value = getattr(config, name)
        if isinstance(value, list) and len(value) == 1:
            setattr(config, name, value[0])
    kinds, coeffs = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    known = (*LOSSES, "sinkhorn", "none")
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        require(kind in known, f"moe_router_load_balancing_type {kind!r}: it can be {', '.join(map(repr, known))}")
    if not isinstance(kinds, str):
        require(
            set(kinds) <= set(LOSSES),
            f"{shown(config, 'moe_router_load_balancing_type')}: only {', '.join(LOSSES)} can stand together",
        )
        require(
            kinds and len(set(kinds)) == len(kinds),
            f"{shown(config, 'moe_router_load_balancing_type')}: name each loss once",
        )
    needed, found = (1 if isinstance(x, (str, int, float)) else len(x) for x in (kinds, coeffs))
    require(
        needed == found,
        f"{shown(config, 'moe_aux_loss_coeff')} must have one value for each of the {needed} of "
        f"{shown(config, 'moe_router_load_balancing_type')}",
    )


def require_router_fits(config: TransformerConfig) -> None:
    """The router's options fit each other."""
    if not config.num_moe_experts:
        return
    require(not config.add_bias_linear, "num_moe_experts needs add_bias_linear to be off")
    require(
        0 < config.moe_router_topk <= config.num_moe_experts,
        f"{shown(config, 'moe_router_topk')} must be at least 1 and at most {shown(config, 'num_moe_experts')}",
    )
    if config.moe_router_enable_expert_bias:
        require(
            config.moe_router_score_function == "sigmoid",
            "moe_router_enable_expert_bias needs moe_router_score_function 'sigmoid'",
        )
    softmax_of_one = config.moe_router_topk == 1 and config.moe_router_score_function == "softmax"
    if softmax_of_one and config.moe_router_load_balancing_type != "sinkhorn":
        require(
            config.moe_router_pre_softmax,
            "moe_router_topk (1) with softmax scores needs moe_router_pre_softmax",
        )
    if config.num_moe_experts >= 32 and config.moe_router_dtype is None:
        warnings.warn(
            f"{shown(config, 'num_moe_experts')}: routing is steadier with moe_router_dtype 'fp32'",
            stacklevel=2,
        )


def derive_router_groups(config: TransformerConfig) -> None:
    """Limited routing: equal groups of experts, of which a token uses some."""
    devices = config.moe_router_topk_limited_devices
    if devices is not None:
        require(
            config.moe_router_group_topk is None,
            "moe_router_topk_limited_devices and moe_router_group_topk say the same; give only the latter",
        )
        config.moe_router_group_topk = devices
        config.moe_router_num_groups = config.expert_model_parallel_size
    if config.moe_router_group_topk is None:
        return
    require(config.moe_router_num_groups, f"{shown(config, 'moe_router_group_topk')} needs moe_router_num_groups")
    if config.num_moe_experts:
        require_divisible(config, "num_moe_experts", by="moe_router_num_groups")
    require(
        config.moe_router_group_topk <= (config.moe_router_num_groups or 0),
        f"{shown(config, 'moe_router_group_topk')} must not exceed {shown(config, 'moe_router_num_groups')}",
    )
    if config.num_moe_experts:
        reachable = config.num_moe_experts // (config.moe_router_num_groups or 1) * config.moe_router_group_topk
        require(
            config.moe_router_group_topk <= config.moe_router_topk <= reachable,
            f"{shown(config, 'moe_router_topk')} must be at least {shown(config, 'moe_router_group_topk')} and at most "
            f"{reachable}, the experts of so many groups",
        )


def require_fp8_for_router_padding(config: TransformerConfig) -> None:
    """Padding for fp8 products has no use without them, and not every dispatcher can undo it."""
    if config.moe_router_padding_for_fp8:
        require(config.fp8, "moe_router_padding_for_fp8 needs fp8")
        require(
            config.moe_token_dispatcher_type != "allgather",
            f"moe_router_padding_for_fp8 does not work with {shown(config, 'moe_token_dispatcher_type')}",
        )


# --- memory and kernels ---------------------------------------------------------------------------


def require_offloading_fits(config: TransformerConfig) -> None:
    """Offloading keeps some layers' activations in host memory; it needs a stack that one rank runs alone."""
    if config.cpu_offloading:
        require(
            0 <= config.cpu_offloading_num_layers < config.num_layers,
            f"{shown(config, 'cpu_offloading_num_layers')} must be below {shown(config, 'num_layers')}",
        )
        require(config.pipeline_model_parallel_size == 1, "cpu_offloading needs pipeline_model_parallel_size 1")
        require(config.recompute_granularity is None, "cpu_offloading does not work with recompute_granularity")
        require(
            config.cpu_offloading_activations or config.cpu_offloading_weights,
            "cpu_offloading has nothing to move: set cpu_offloading_activations or cpu_offloading_weights",
        )


NOT_CAPTURED: tuple[tuple[str, Callable[[TransformerConfig], Any], str], ...] = (
    ("cpu_offloading", lambda config: config.cpu_offloading, "activations stay where they were captured"),
    ("recompute_granularity", lambda config: config.recompute_granularity, "a captured forward keeps its activations"),
    ("num_moe_experts", lambda config: config.num_moe_experts, "how many tokens an expert gets changes"),
    ("variable_seq_lengths", lambda config: config.variable_seq_lengths, "shapes are captured"),
    ("hidden_dropout", lambda config: config.hidden_dropout > 0, "random states live on the host: set it to 0"),
    ("attention_dropout", lambda config: config.attention_dropout > 0, "random states live on the host: set it to 0"),
    ("fp8", lambda config: config.fp8, "its scales are chosen on the host"),
    ("context_parallel_size", lambda config: config.context_parallel_size > 1, "keys that travel are not captured"),
    ("tp_comm_overlap", lambda config: config.tp_comm_overlap, "its pieces have streams of their own"),
    (
        "overlap_p2p_comm",
        lambda config: config.overlap_p2p_comm,
        "a capture waits for all transfers that are under way",
    ),
    ("delay_wgrad_compute", lambda config: config.delay_wgrad_compute, "a captured backward is whole"),
    ("pipeline_schedule", lambda config: config.pipeline_schedule.startswith("zb-"), "a captured backward is whole"),
)
"""Field, whether it is in use, and why it keeps a layer from being captured."""


def require_capturable_layers(config: TransformerConfig) -> None:
    """A captured layer does the same each time: no other shapes, random numbers or places."""
    if config.enable_cuda_graph:
        for name, used, reason in NOT_CAPTURED:
            require(not used(config), f"enable_cuda_graph does not work with {shown(config, name)}: {reason}")


LATENT_ATTENTION_RULES: tuple[Any, ...] = (require_yarn_for_fused_rope, require_latents_fit)

TRANSFORMER_RULES: tuple[Any, ...] = (
    require_one_half_precision,
    set_bf16_matmul_precision,
    require_heads_fit_tensor_parallel,
    derive_ffn_hidden_size,
    require_feed_forward_fits_tensor_parallel,
    derive_kv_channels,
    derive_num_query_groups,
    require_query_groups_fit,
    require_dropout_is_probability,
    require_valid_window,
    require_known_normalization,
    require_fp8_fits,
    require_experts_for_expert_parallel,
    derive_moe_ffn_hidden_size,
    require_dispatcher_fits,
    require_positive_shared_expert,
    derive_capacity_factor,
    require_offloading_fits,
    *DEPTH_RULES,
    force_fp32_softmax_under_layer_scaling,
    require_fusable_activation,
    require_swiglu_for_fp8_store,
    require_plain_rotation,
    derive_init_methods,
    require_balancing_fits,
    require_router_fits,
    derive_router_groups,
    require_fp8_for_router_padding,
    require_capturable_layers,
    *CONTEXT_PARALLEL_RULES,
    expand_no_rope_freq,
)
