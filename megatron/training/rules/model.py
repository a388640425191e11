"""Rules about the model: sizes, activation, positions, attention and experts."""

from __future__ import annotations

import argparse
import importlib.util

from megatron.core.device import device_type
from megatron.core.export.weights import is_gated
from megatron.core.transformer.enums import AttnBackend
from megatron.training.rules.data import copy_alias, nearest_multiples
from megatron.training.settings import refuse_unless, warn, was_given

ROTARY_TYPES = ("rope", "yarn")


# --- sizes ----------------------------------------------------------------------------------------


def derive_num_layers(args: argparse.Namespace) -> None:
    """`--num-layers` and `--encoder-num-layers` are two names of one thing."""
    copy_alias(args, "num_layers", "encoder_num_layers")


def require_model_sizes(args: argparse.Namespace) -> None:
    """Four sizes have no sensible default."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    refuse_unless(
        not missing,
        f"the model's sizes are incomplete: {', '.join(missing)} missing; --use-checkpoint-args takes them "
        "from the checkpoint in --load",
    )
    for name in names:
        value = getattr(args, name)
        refuse_unless(value > 0, f"--{name.replace('_', '-')} ({value}) must be positive")


def derive_ffn_hidden_size(args: argparse.Namespace) -> None:
    """Four times the hidden size; gated, with a third matrix that costs as much, two thirds of that."""
    if args.ffn_hidden_size is None:
        full = 4 * args.hidden_size
        args.ffn_hidden_size = int(full * 2 / 3 / 64) * 64 if is_gated(vars(args)) else full


def derive_kv_channels(args: argparse.Namespace) -> None:
    """A head's width is its share of the hidden size."""
    if args.kv_channels is None:
        refuse_unless(
            args.hidden_size % args.num_attention_heads == 0,
            f"--hidden-size ({args.hidden_size}) must be divisible by --num-attention-heads "
            f"({args.num_attention_heads}), or --kv-channels be given",
        )
        args.kv_channels = args.hidden_size // args.num_attention_heads


def require_heads_fit(args: argparse.Namespace) -> None:
    """Each tensor parallel rank computes whole heads and whole groups of them."""
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    refuse_unless(
        heads % tp == 0,
        f"--num-attention-heads ({heads}) must be divisible by --tensor-model-parallel-size ({tp})",
    )
    groups = args.num_query_groups
    if args.group_query_attention:
        refuse_unless(
            groups > 0 and heads % groups == 0,
            f"--num-attention-heads ({heads}) must be divisible by --num-query-groups ({groups})",
        )
        refuse_unless(
            groups % tp == 0,
            f"--num-query-groups ({groups}) must be divisible by --tensor-model-parallel-size ({tp})",
        )
    else:
        refuse_unless(
            not was_given(args, "num_query_groups") or groups in (1, heads),
            f"--num-query-groups ({groups}) needs --group-query-attention",
        )


# --- activation and bias --------------------------------------------------------------------------


def require_one_activation(args: argparse.Namespace) -> None:
    """A feed-forward block has one activation."""
    chosen = [f"--{name.replace('_', '-')}" for name in ("swiglu", "geglu", "squared_relu") if getattr(args, name)]
    refuse_unless(len(chosen) < 2, f"{' and '.join(chosen)} exclude each other")


def drop_gelu_fusion_where_it_cannot_be(args: argparse.Namespace) -> None:
    """Fused bias and gelu needs a bias and gelu."""
    if not args.add_bias_linear or args.squared_relu:
        args.bias_gelu_fusion = False


def imply_qkv_bias(args: argparse.Namespace) -> None:
    """Where all linear layers have a bias, so has the query/key/value projection."""
    if args.add_bias_linear:
        args.add_qkv_bias = True


# --- positions ------------------------------------------------------------------------------------


def imply_rope(args: argparse.Namespace) -> None:
    """`--use-rotary-position-embeddings` is the older spelling."""
    if args.use_rotary_position_embeddings and args.position_embedding_type not in ROTARY_TYPES:
        refuse_unless(
            not was_given(args, "position_embedding_type"),
            f"--use-rotary-position-embeddings and --position-embedding-type {args.position_embedding_type} "
            "exclude each other",
        )
        args.position_embedding_type = "rope"


def require_interleaved_rope_fits(args: argparse.Namespace) -> None:
    """The fused rotation knows the half-and-half layout only."""
    if args.rotary_interleaved:
        refuse_unless(not args.apply_rope_fusion, "--rotary-interleaved needs --no-rope-fusion")


def drop_rope_fusion_without_rope(args: argparse.Namespace) -> None:
    """What does not rotate needs no rotation kernel."""
    if args.position_embedding_type != "rope":
        args.apply_rope_fusion = False


def require_rope_without_positions(args: argparse.Namespace) -> None:
    """The older switch against learned positions goes with rotary ones."""
    if not args.add_position_embedding:
        refuse_unless(
            args.position_embedding_type in ROTARY_TYPES,
            "--no-position-embedding needs --position-embedding-type rope, found "
            f"{args.position_embedding_type}; for no positions at all use --position-embedding-type none "
            "alone",
        )


def require_position_settings(args: argparse.Namespace) -> None:
    """Each kind of positions has settings of its own."""
    kind = args.position_embedding_type
    if kind == "mrope":
        refuse_unless(args.mrope_section is not None, "--position-embedding-type mrope needs --mrope-section")
    needs = ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings")
    given = [f"--{name.replace('_', '-')}" for name in needs if getattr(args, name) is not None]
    if kind == "yarn":
        refuse_unless(
            len(given) == 2,
            "--position-embedding-type yarn needs --yarn-rotary-scaling-factor and "
            "--yarn-original-max-position-embeddings",
        )
    else:
        refuse_unless(not given, f"{' and '.join(given)} need --position-embedding-type yarn, found {kind}")
    if args.use_rope_scaling:
        refuse_unless(kind == "rope", f"--use-rope-scaling needs --position-embedding-type rope, found {kind}")
    refuse_unless(
        0 < args.rotary_percent <= 1,
        f"--rotary-percent ({args.rotary_percent}) must be above 0 and at most 1",
    )


# --- attention ------------------------------------------------------------------------------------


def choose_transformer_impl(args: argparse.Namespace) -> None:
    """Layers of this library, unless Transformer Engine is asked for (refused while it is not built)."""
    if args.transformer_impl == "transformer_engine" and not was_given(args, "transformer_impl"):
        args.transformer_impl = "local"


def choose_flash_attention(args: argparse.Namespace) -> None:
    """`--use-flash-attn` is `--attention-backend flash`, and needs the package it names.

    The public rule allows the backend `local` with `--spec local` only, for its layers are otherwise those of
    another package; here the layers are local always.
    """
    if not args.use_flash_attn:
        return
    refuse_unless(
        args.attention_backend in (AttnBackend.auto, AttnBackend.flash),
        f"--use-flash-attn and --attention-backend {args.attention_backend.name} exclude each other",
    )
    refuse_unless(
        device_type() == "cuda" and importlib.util.find_spec("flash_attn") is not None,
        "--use-flash-attn needs a CUDA device and the package flash-attn; without it, torch's own "
        "attention kernels are used",
    )
    args.attention_backend = AttnBackend.flash


LATENT_SETTINGS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
)


def require_latent_settings(args: argparse.Namespace) -> None:
    """Latent attention has sizes, positions and a temperature of its own, which nothing else reads."""
    if not args.multi_latent_attention:
        given = [f"--{name.replace('_', '-')}" for name in LATENT_SETTINGS if was_given(args, name)]
        refuse_unless(
            not given, f"{', '.join(given)}: only --multi-latent-attention reads that; give it, or leave them out"
        )
        return
    refuse_unless(
        not args.group_query_attention,
        "--multi-latent-attention has no groups of heads: leave --group-query-attention out; --kv-lora-rank makes keys "
        "and values small",
    )
    refuse_unless(not args.qk_l2_norm, "--multi-latent-attention has no norm of heads: leave --qk-l2-norm out")
    other = {
        "--use-rope-scaling": args.use_rope_scaling,
        "--rotary-seq-len-interpolation-factor": args.rotary_seq_len_interpolation_factor is not None,
        f"--position-embedding-type {args.position_embedding_type}": args.position_embedding_type in ("yarn", "mrope"),
    }
    given = [name for name, is_given in other.items() if is_given]
    refuse_unless(
        not given,
        f"--multi-latent-attention rotates its own channels: {', '.join(given)} would do nothing; "
        "--rotary-scaling-factor, --mscale and --mscale-all-dim stretch its context (YaRN)",
    )


# --- experts and further prediction ---------------------------------------------------------------


def derive_num_experts(args: argparse.Namespace) -> None:
    """No experts is a dense model; experts are as wide as the dense block, and exclude an own layer spec."""
    if args.num_experts == 0:
        args.num_experts = None
    if args.num_experts is None:
        return
    refuse_unless(args.spec is None or args.model_family == "mamba", "--num-experts and --spec exclude each other")
    if args.moe_ffn_hidden_size is None:
        args.moe_ffn_hidden_size = args.ffn_hidden_size // max(1, args.moe_upcycling_granularity)
        warn(args, f"--moe-ffn-hidden-size is not given; experts are {args.moe_ffn_hidden_size} wide")


def require_upcycling_fits(args: argparse.Namespace) -> None:
    """Experts made of a dense block are whole copies of it, or of equal shards of it."""
    parts = args.moe_upcycling_granularity
    refuse_unless(parts > 0, f"--moe-upcycling-granularity ({parts}) must be positive")
    if not args.moe_use_upcycling:
        refuse_unless(parts == 1, f"--moe-upcycling-granularity ({parts}): only --moe-use-upcycling reads it")
        return
    refuse_unless(args.num_experts, "--moe-use-upcycling needs --num-experts")
    refuse_unless(
        not args.moe_shared_expert_intermediate_size,
        "--moe-use-upcycling has nothing to make shared experts of: leave --moe-shared-expert-intermediate-size out",
    )
    for flag, value in (("--num-experts", args.num_experts), ("--moe-router-topk", args.moe_router_topk)):
        refuse_unless(
            value % parts == 0, f"{flag} ({value}) must be divisible by --moe-upcycling-granularity ({parts})"
        )
    refuse_unless(
        args.moe_ffn_hidden_size * parts == args.ffn_hidden_size,
        f"--moe-ffn-hidden-size ({args.moe_ffn_hidden_size}) must be --ffn-hidden-size ({args.ffn_hidden_size}) / "
        f"--moe-upcycling-granularity ({parts})",
    )


def require_experts_fit_ranks(args: argparse.Namespace) -> None:
    """Expert parallel ranks hold equal numbers of experts."""
    size = args.expert_model_parallel_size
    if size > 1:
        refuse_unless(args.num_experts is not None, f"--expert-model-parallel-size {size} needs --num-experts")
        refuse_unless(
            args.num_experts % size == 0,
            f"--num-experts ({args.num_experts}) must be divisible by --expert-model-parallel-size ({size}); "
            f"{nearest_multiples(args.num_experts, size)}",
        )
        refuse_unless(not args.fp16, "--expert-model-parallel-size above 1 does not work with --fp16; use --bf16")


def require_further_prediction_fits(args: argparse.Namespace) -> None:
    """Modules that predict further ahead embed tokens at other places, for which a table of positions has no rows."""
    if args.mtp_num_layers is None:
        refuse_unless(
            not was_given(args, "mtp_loss_scaling_factor"), "--mtp-loss-scaling-factor needs --mtp-num-layers"
        )
        return
    refuse_unless(args.mtp_num_layers > 0, f"--mtp-num-layers ({args.mtp_num_layers}) must be positive; leave it out")
    kinds = ("rope", "yarn", "none")
    refuse_unless(
        args.position_embedding_type in kinds,
        f"--mtp-num-layers needs --position-embedding-type {', '.join(kinds)}, found {args.position_embedding_type}",
    )
    refuse_unless(
        not args.use_torch_fsdp2,
        "--mtp-num-layers does not work with --use-torch-fsdp2; use --use-distributed-optimizer",
    )


def require_loss_in_pieces_fits(args: argparse.Namespace) -> None:
    """Output layer and loss in one: only for models whose output layer is nothing but a product."""
    if args.cross_entropy_fusion_impl != "linear":
        return
    flag = "--cross-entropy-fusion-impl linear"
    refuse_unless(args.cross_entropy_loss_fusion, f"{flag} needs --cross-entropy-loss-fusion")
    refuse_unless(
        (args.model_family or "gpt") in ("gpt", "mamba"),
        f"{flag}: only pretrain_gpt.py and pretrain_mamba.py can do that; use --cross-entropy-fusion-impl native",
    )
    refuse_unless(
        not args.defer_embedding_wgrad_compute,
        f"{flag} does not work with --defer-embedding-wgrad-compute, which would keep all logits' gradients",
    )


MODEL_RULES = (
    derive_num_layers,
    require_model_sizes,
    derive_ffn_hidden_size,
    derive_kv_channels,
    require_heads_fit,
    require_one_activation,
    drop_gelu_fusion_where_it_cannot_be,
    imply_qkv_bias,
    imply_rope,
    require_interleaved_rope_fits,
    drop_rope_fusion_without_rope,
    require_rope_without_positions,
    choose_transformer_impl,
    require_position_settings,
    choose_flash_attention,
    require_latent_settings,
    derive_num_experts,
    require_upcycling_fits,
    require_experts_fit_ranks,
    require_further_prediction_fits,
    require_loss_in_pieces_fits,
)
