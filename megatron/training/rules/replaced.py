"""Flags that others have replaced, and flags that do nothing here."""

from __future__ import annotations

import argparse

from megatron.training.capabilities import capabilities_not_built
from megatron.training.config.flags import Flag, all_flags
from megatron.training.settings import refuse_unless, warn

REPLACEMENTS = {
    "batch_size": "--micro-batch-size",
    "warmup": "--lr-warmup-fraction",
    "model_parallel_size": "--tensor-model-parallel-size",
}

ACCEPTED_WITHOUT_EFFECT = (
    "ckpt_assume_constant_structure",
    "ckpt_fully_parallel_save_deprecated",
    "clone_scatter_output_in_embedding",
    "deprecated_use_mcore_models",
    "enable_gloo_process_groups",
    "scatter_gather_tensors_in_pipeline",
    "tp_comm_bootstrap_backend",
)
"""Documented flags that ask for what is done anyway, or for less work than is done; results are the same."""

HIDDEN_WITH_EFFECT = ("enable_msc",)
"""Flags without documentation of which this is not so."""


def is_without_effect(flag: Flag) -> bool:
    """Whether setting the flag is accepted and changes nothing."""
    if flag.dest in HIDDEN_WITH_EFFECT or flag.dest in capabilities_not_built():
        return False
    return flag.hidden or flag.dest in ACCEPTED_WITHOUT_EFFECT


def refuse_replaced_flags(args: argparse.Namespace) -> None:
    """Flags whose meaning another one has taken are refused; their arguments do not outlive this rule."""
    for dest, replacement in REPLACEMENTS.items():
        value = vars(args).pop(dest, None)
        flag = f"--{dest.replace('_', '-')}"
        refuse_unless(value is None, f"{flag} ({value}) no longer exists; use {replacement} {value}")


def refuse_checkpoint_activations(args: argparse.Namespace) -> None:
    """Activation checkpointing is called recompute, and comes in several kinds."""
    refuse_unless(
        not vars(args).pop("checkpoint_activations", False),
        "--checkpoint-activations no longer exists; use --recompute-activations, or "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    )


def expand_recompute_activations(args: argparse.Namespace) -> None:
    """`--recompute-activations` is short for selective recompute."""
    if vars(args).pop("recompute_activations", False):
        args.recompute_granularity = "selective"


def warn_of_flags_without_effect(args: argparse.Namespace) -> None:
    """Flags that nothing here corresponds to are accepted, and named in one line."""
    given = [
        flag.names[0]
        for flag in all_flags().values()
        if is_without_effect(flag) and hasattr(args, flag.dest) and getattr(args, flag.dest) != flag.default
    ]
    if given:
        warn(args, f"accepted without effect: {' '.join(given)}")


REPLACED_RULES = (
    refuse_replaced_flags,
    refuse_checkpoint_activations,
    expand_recompute_activations,
    warn_of_flags_without_effect,
)
