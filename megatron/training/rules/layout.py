"""Rules about parallel sizes: how ranks divide into groups and layers into stages."""

from __future__ import annotations

import argparse
import math
import os

from megatron.core.device import device_type
from megatron.training.config.flags import all_flags
from megatron.training.settings import refuse_unless, warn

PARALLEL_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def require_world_fits_layout(args: argparse.Namespace) -> None:
    """The ranks divide into equal copies of the model; what is left over is data parallelism."""
    sizes = {f"--{name.replace('_', '-')}": getattr(args, name) for name in PARALLEL_SIZES}
    encoder = args.encoder_pipeline_model_parallel_size
    for flag, size in sizes.items():
        refuse_unless(size >= 1, f"{flag} ({size}) must be at least 1")
    if encoder:
        stages = sizes.pop("--pipeline-model-parallel-size")
        sizes["(--encoder-pipeline-model-parallel-size + --pipeline-model-parallel-size)"] = encoder + stages
    model_size = ranks_of_a_model(args)
    product = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
    refuse_unless(
        args.world_size % model_size == 0,
        f"{args.world_size} processes (WORLD_SIZE) do not divide by {product} = {model_size}; start a "
        f"multiple of {model_size} processes (torchrun --nproc-per-node), or make the sizes smaller",
    )


def ranks_of_a_model(args: argparse.Namespace) -> int:
    """Ranks that hold one copy of the model; an encoder's stages come on top of its decoder's."""
    stages = args.encoder_pipeline_model_parallel_size + args.pipeline_model_parallel_size
    return args.tensor_model_parallel_size * stages * args.context_parallel_size


def derive_data_parallel_size(args: argparse.Namespace) -> None:
    """Copies of the model that train on different samples."""
    args.data_parallel_size = args.world_size // ranks_of_a_model(args)
    args.transformer_pipeline_model_parallel_size = (
        args.encoder_pipeline_model_parallel_size + args.pipeline_model_parallel_size
    )


def require_context_groups_fit(args: argparse.Namespace) -> None:
    """Nested context parallel groups multiply to the whole; the scheme that uses them needs their sizes."""
    sizes = args.hierarchical_context_parallel_sizes
    if sizes is not None:
        refuse_unless(
            math.prod(sizes) == args.context_parallel_size,
            f"--hierarchical-context-parallel-sizes {sizes} multiply to {math.prod(sizes)}, but "
            f"--context-parallel-size is {args.context_parallel_size}",
        )
    if "a2a+p2p" in (args.cp_comm_type or ()):
        refuse_unless(sizes, "--cp-comm-type a2a+p2p needs --hierarchical-context-parallel-sizes")
    elif sizes is not None:
        warn(args, "--hierarchical-context-parallel-sizes has no effect without --cp-comm-type a2a+p2p")


def derive_expert_tensor_parallel_size(args: argparse.Namespace) -> None:
    """Experts are split like the other layers unless told otherwise."""
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = args.tensor_model_parallel_size


def drop_sequence_parallel_of_one_rank(args: argparse.Namespace) -> None:
    """One tensor parallel rank has nothing to split the sequence over."""
    if args.tensor_model_parallel_size == 1 and args.sequence_parallel:
        warn(args, "--sequence-parallel has no effect with --tensor-model-parallel-size 1; switched off")
        args.sequence_parallel = False


def require_sequence_parallel_for_overlap(args: argparse.Namespace) -> None:
    """The overlap hides the collectives that sequence parallelism makes."""
    if args.tp_comm_overlap:
        refuse_unless(args.sequence_parallel, "--tp-comm-overlap needs --sequence-parallel")
        return
    parts = ("overlap_ag", "overlap_rs", "overlap_rs_dgrad", "bulk_dgrad", "bulk_wgrad", "split_ag", "split_rs")
    flags = [all_flags()[f"tp_comm_{part}"] for part in parts]
    given = [flag.names[0] for flag in flags if getattr(args, flag.dest) != flag.default]
    if given:
        warn(args, f"{' '.join(given)} has no effect without --tp-comm-overlap")


def require_saved_vocabulary_fits_ranks(args: argparse.Namespace) -> None:
    """A padded vocabulary taken from a checkpoint divides over the ranks, as one that is still to be padded will."""
    saved, ranks = args.padded_vocab_size, args.tensor_model_parallel_size
    if saved is not None:
        refuse_unless(
            saved % ranks == 0,
            f"the checkpoint's padded vocabulary ({saved}) must be divisible by --tensor-model-parallel-size ({ranks})",
        )


def set_cuda_connections(args: argparse.Namespace) -> None:
    """On CUDA, one hardware queue keeps collectives behind the kernels they must follow, before Blackwell.

    The public rule refuses another value of CUDA_DEVICE_MAX_CONNECTIONS. Here it is only a matter of speed:
    the rule sets the variable where it is unset and warns of another value. Elsewhere than on CUDA it does
    not apply.
    """
    several = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    if device_type() != "cuda" or not several or args.use_torch_fsdp2 or args.use_custom_fsdp:
        return
    found = os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if found != "1":
        warn(args, f"CUDA_DEVICE_MAX_CONNECTIONS is {found}; 1 overlaps communication better before Blackwell")


LAYOUT_RULES = (
    require_world_fits_layout,
    derive_data_parallel_size,
    require_context_groups_fit,
    derive_expert_tensor_parallel_size,
    drop_sequence_parallel_of_one_rank,
    require_sequence_parallel_for_overlap,
    require_saved_vocabulary_fits_ranks,
    set_cuda_connections,
)
