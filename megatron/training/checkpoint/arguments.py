"""Settings taken over from a checkpoint, and the comparison of a checkpoint's settings with those of the
run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron.training.rules.model import LATENT_SETTINGS
from megatron.training.settings import Settings, Source, refuse_unless, source_of

ONLY_IF_UNSET = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "seq_length",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "decoder_seq_length",
    "padded_vocab_size",
    "ckpt_format",
)
"""Taken where this run has no value of its own."""

ALWAYS = (
    "num_query_groups",
    "group_query_attention",
    "position_embedding_type",
    "add_position_embedding",
    "use_rotary_position_embeddings",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "add_bias_linear",
    "add_qkv_bias",
    "squared_relu",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "apply_layernorm_1p",
    "normalization",
    "apply_query_key_layer_scaling",
    "attention_dropout",
    "hidden_dropout",
    "hybrid_override_pattern",
    "spec",
    "hybrid_attention_ratio",
    "hybrid_mlp_ratio",
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_token_dispatcher_type",
    "moe_router_pre_softmax",
    "moe_grouped_gemm",
    "moe_shared_expert_intermediate_size",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "is_hybrid_model",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "tokenizer_type",
    "tiktoken_pattern",
)
"""Taken wherever the checkpoint has a value: they decide what its weights mean."""

ALWAYS_HERE = (
    "window_size",
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_mscale",
    "yarn_mscale_all_dim",
    "use_rope_scaling",
    "rope_scaling_factor",
    "qk_layernorm",
    "qk_l2_norm",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "norm_epsilon",
    "apply_residual_connection_post_layernorm",
    "bias_gelu_fusion",
    "hf_vocab_size",
    "decoder_num_layers",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "geglu",
    "softmax_scale",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_apply_probs_on_input",
)
"""Likewise, in addition to the public list: weights trained with them are wrong without them."""

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "encoder_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


def apply_checkpoint_args(
    args: argparse.Namespace, checkpoint_args: argparse.Namespace | Mapping[str, Any], *, path: str = ""
) -> None:
    """Take the model's settings, and with `--use-mp-args-from-checkpoint-args` the layout, from a checkpoint.

    Args:
        checkpoint_args: the settings that the checkpoint was saved with.
        path: where the checkpoint lies, for --explain-config.
    """
    saved = checkpoint_args if isinstance(checkpoint_args, Mapping) else vars(checkpoint_args)
    source = Source("checkpoint", path or str(getattr(args, "load", "") or ""))
    for name in ONLY_IF_UNSET:
        if is_unset(args, name):
            take(args, name, saved.get(name), source)
    latent = saved.get("multi_latent_attention")
    for name in (*ALWAYS, *ALWAYS_HERE):
        if latent or name not in LATENT_SETTINGS:
            take(args, name, saved.get(name), source)
    if not saved.get("num_experts"):
        args.moe_ffn_hidden_size = None
    if getattr(args, "use_tokenizer_model_from_checkpoint_args", True):
        take(args, "tokenizer_model", saved.get("tokenizer_model"), source)
    if getattr(args, "use_mp_args_from_checkpoint_args", False):
        for name in LAYOUT:
            take(args, name, saved.get(name), source)
        if is_unset(args, "num_layers_per_virtual_pipeline_stage"):
            per_stage = saved.get("num_layers_per_virtual_pipeline_stage")
            take(args, "num_layers_per_virtual_pipeline_stage", per_stage, source)


def is_unset(args: argparse.Namespace, name: str) -> bool:
    """Whether nobody has asked for a value; a default that is not None counts as unset where sources are
    known."""
    if getattr(args, name, None) is None:
        return True
    return isinstance(args, Settings) and not source_of(args, name).given


def take(args: argparse.Namespace, name: str, value: Any, source: Source) -> None:
    """Set one value that the checkpoint has."""
    if value is None:
        return
    if isinstance(args, Settings):
        args.put(name, value, source)
    else:
        setattr(args, name, value)


def require_same_model(args: argparse.Namespace, checkpoint_args: argparse.Namespace | Mapping[str, Any]) -> None:
    """Refuse to continue a run with another model than its checkpoint's; all differences are named at once.

    Raises:
        ConfigurationError: a size, the vocabulary or, for the `torch` format, the layout differs.
    """
    saved = checkpoint_args if isinstance(checkpoint_args, Mapping) else vars(checkpoint_args)
    names = ["num_layers", "decoder_num_layers", "hidden_size", "num_attention_heads", "add_position_embedding"]
    whole_file = getattr(args, "ckpt_format", None) == "torch"
    if getattr(args, "vocab_file", None):
        names += ["max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"]
        names += ["padded_vocab_size"] if whole_file else []
    if whole_file:
        names += ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
        names += ["encoder_pipeline_model_parallel_size"]
    differences = [
        f"{name} is {getattr(args, name)!r} here and {saved[name]!r} in the checkpoint"
        for name in names
        if name in saved and getattr(args, name, None) != saved[name]
    ]
    refuse_unless(
        not differences,
        "this run's model is not the checkpoint's: "
        + "; ".join(differences)
        + " (--use-checkpoint-args takes the checkpoint's settings; --finetune starts anew from its weights)",
    )
