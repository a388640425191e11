"""Rules of models with state space layers: which layers there are, and who shares their heads."""

from __future__ import annotations

import argparse

from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, allocate_layers
from megatron.core.ssm.mamba_sizes import MambaSizes
from megatron.training.settings import refuse_unless

SPEC = "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"


def layers_of(args: argparse.Namespace) -> str:
    """The symbol of each layer.

    Raises:
        ValueError: ratios or pattern do not fit.
    """
    return "".join(
        allocate_layers(
            args.num_layers, args.hybrid_attention_ratio, args.hybrid_mlp_ratio, args.hybrid_override_pattern
        )
    )


def sizes_of(args: argparse.Namespace) -> MambaSizes:
    """Widths of a mixer.

    Raises:
        ValueError: they do not fit each other.
    """
    return MambaSizes.of(
        args.hidden_size,
        mamba_head_dim=args.mamba_head_dim,
        mamba_num_groups=args.mamba_num_groups,
        mamba_state_dim=args.mamba_state_dim,
        mamba_num_heads=args.mamba_num_heads,
    )


def require_spec(args: argparse.Namespace) -> None:
    """What the layers are made of is said, as elsewhere."""
    if args.model_family != "mamba":
        return
    refuse_unless(
        args.spec is not None and len(args.spec) == 2,
        f"pretrain_mamba.py needs --spec with a module and a name in it; this library's layers are --spec {SPEC}",
    )


def require_fitting_layers(args: argparse.Namespace) -> None:
    """Pattern and ratios describe the layers that there are, and experts go with layers that have them."""
    if args.model_family != "mamba":
        return
    layers = layers_of(args)
    refuse_unless(
        Symbols.MOE not in layers or args.num_experts,
        f"--hybrid-override-pattern {layers} has mixtures of experts ({Symbols.MOE}): it needs --num-experts, or "
        f"{Symbols.MLP} in their place",
    )
    refuse_unless(
        Symbols.MOE in layers or not args.num_experts,
        f"--num-experts {args.num_experts}: none of the layers {layers} is a mixture of experts; write "
        f"{Symbols.MOE} for those that are in --hybrid-override-pattern",
    )


def require_shareable_heads(args: argparse.Namespace) -> None:
    """Tensor and context parallel ranks hold equal numbers of heads, with the groups that belong to them."""
    if args.model_family != "mamba" or Symbols.MAMBA not in layers_of(args):
        return
    sizes_of(args).over_tensor_ranks(args.tensor_model_parallel_size).require_context_ranks(args.context_parallel_size)


def derive_mamba_num_heads(args: argparse.Namespace) -> None:
    """A mixer is twice as wide as the residual stream."""
    if args.model_family == "mamba" and args.mamba_num_heads is None:
        args.mamba_num_heads = sizes_of(args).heads


def require_what_a_recurrence_can_do(args: argparse.Namespace) -> None:
    """A state runs through the whole sample: documents in it are not isolated from each other."""
    if args.model_family != "mamba":
        return
    refuse_unless(
        not args.reset_attention_mask or Symbols.MAMBA not in layers_of(args),
        "--reset-attention-mask isolates the documents of a sample for attention only; the state of state space layers "
        "would still run through them. Leave it out; --eod-mask-loss and --reset-position-ids work",
    )
    refuse_unless(
        args.position_embedding_type in ("none", "rope", "learned_absolute"),
        f"--position-embedding-type {args.position_embedding_type}: pretrain_mamba.py has none, rope, learned_absolute",
    )
    for name in ("multi_latent_attention", "mtp_num_layers"):
        refuse_unless(not getattr(args, name), f"--{name.replace('_', '-')}: only pretrain_gpt.py has that")
    refuse_unless(not args.qk_l2_norm, "--qk-l2-norm: pretrain_mamba.py has --qk-layernorm instead")
    refuse_unless(not args.use_rope_scaling, "--use-rope-scaling: pretrain_mamba.py has --rotary-base instead")


HYBRID_RULES = (
    require_spec,
    require_fitting_layers,
    require_shareable_heads,
    derive_mamba_num_heads,
    require_what_a_recurrence_can_do,
)
