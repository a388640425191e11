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
    for flag, size in sizes.items():
        refuse_unless(size >= 1, f"{flag} ({size}) must be at least 1")
    model_size = math.prod(sizes.values())
    product = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
    refuse_unless(
        args.world_size % model_size == 0,
        f"{args.world_size} processes (WORLD_SIZE) do not divide by {product} = {model_size}; start a "
        f"multiple of {model_size} processes (torchrun --nproc-per-node), or make the sizes smaller",
    )


def derive_data_parallel_size(args: argparse.Namespace) -> None:
    """Copies of the model that train on different samples."""
    args.data_parallel_size = args.world_size // math.prod(getattr(args, name) for name in PARALLEL_SIZES)
    args.transformer_pipeline_model_parallel_size = args.pipeline_model_parallel_size


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


# --- pipeline -------------------------------------------------------------------------------------


def counted_layers(args: argparse.Namespace) -> int | None:
    """Layers, with embedding and loss counted where that is asked for; None when the depth is unknown."""
    layers = args.num_layers or args.encoder_num_layers
    if layers is None:
        return None
    return layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split


def require_one_way_to_chunks(args: argparse.Namespace) -> None:
    """Model chunks are given by their layers, by their number, or by a layout."""
    names = (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    )
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    refuse_unless(len(given) <= 1, f"{' and '.join(given)} exclude each other; give one of them")


def derive_chunks_from_layout(args: argparse.Namespace) -> None:
    """A layout with a multiple of the stages gives each rank that many chunks."""
    if args.pipeline_model_parallel_layout is not None:
        stages = len(args.pipeline_model_parallel_layout.split("|"))
        ranks = args.pipeline_model_parallel_size
        refuse_unless(
            stages % ranks == 0,
            f"--pipeline-model-parallel-layout has {stages} stages, which do not divide by "
            f"--pipeline-model-parallel-size {ranks}",
        )
        args.virtual_pipeline_model_parallel_size = stages // ranks if stages > ranks else None


def derive_chunks_from_layer_count(args: argparse.Namespace) -> None:
    """Layers per rank, divided by layers per chunk."""
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return
    refuse_unless(
        args.decoder_first_pipeline_num_layers is None and args.decoder_last_pipeline_num_layers is None,
        "--num-layers-per-virtual-pipeline-stage does not work with "
        "--decoder-first/last-pipeline-num-layers; use --num-virtual-stages-per-pipeline-rank",
    )
    layers, ranks = counted_layers(args), args.pipeline_model_parallel_size
    if layers is not None:
        refuse_unless(
            layers % ranks == 0 and layers // ranks % per_chunk == 0,
            f"{layers} layers do not divide over --pipeline-model-parallel-size {ranks} into chunks of "
            f"--num-layers-per-virtual-pipeline-stage {per_chunk}",
        )
        args.virtual_pipeline_model_parallel_size = layers // ranks // per_chunk


def derive_chunks_from_their_number(args: argparse.Namespace) -> None:
    """The number is given as it is."""
    if args.num_virtual_stages_per_pipeline_rank is not None:
        args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank


def require_layers_fit_stages(args: argparse.Namespace) -> None:
    """Without another instruction all stages are equal."""
    uneven = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) != (None, None)
    layers, ranks = counted_layers(args), args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size is None and not uneven and layers is not None:
        refuse_unless(
            args.pipeline_model_parallel_layout is not None or layers % ranks == 0,
            f"--num-layers {args.num_layers or args.encoder_num_layers} (counted as {layers}) does not "
            f"divide by --pipeline-model-parallel-size {ranks}; --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers allow uneven stages",
        )


def require_stages_for_chunks(args: argparse.Namespace) -> None:
    """Interleaving needs a neighbour to send to while computing, and one more if sending cannot overlap."""
    if args.virtual_pipeline_model_parallel_size is not None:
        least = 2 if args.overlap_p2p_comm else 3
        refuse_unless(
            args.pipeline_model_parallel_size >= least,
            f"model chunks need --pipeline-model-parallel-size of at least {least}, found "
            f"{args.pipeline_model_parallel_size}",
        )


def drop_overlap_without_chunks(args: argparse.Namespace) -> None:
    """Only interleaved schedules overlap stage traffic, and only their chunks align gathers."""
    if args.virtual_pipeline_model_parallel_size is None:
        args.overlap_p2p_comm = False
        args.align_param_gather = False


PIPELINE_CHUNK_RULES = (
    require_one_way_to_chunks,
    derive_chunks_from_layout,
    derive_chunks_from_layer_count,
    derive_chunks_from_their_number,
    require_layers_fit_stages,
    require_stages_for_chunks,
    drop_overlap_without_chunks,
)
