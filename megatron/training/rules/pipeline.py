"""Rules about pipelines: model chunks, layers on stages, schedules."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron.core.stage_placement import Placement, placement_shape
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training.settings import refuse_unless


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
        stages = PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout)
        ranks = args.pipeline_model_parallel_size
        refuse_unless(
            stages % ranks == 0,
            f"--pipeline-model-parallel-layout has {stages} stages, which do not divide by "
            f"--pipeline-model-parallel-size {ranks}",
        )
        args.virtual_pipeline_model_parallel_size = stages // ranks if stages > ranks else None


def require_layers_on_every_rank(args: argparse.Namespace) -> None:
    """A stage of a layout may be empty, but a rank without any parameters would have nothing to train."""
    if args.pipeline_model_parallel_layout is None:
        return
    stages = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout)
    ranks = args.pipeline_model_parallel_size
    placement = Placement(ranks, len(stages) // ranks, placement_shape(args.pipeline_schedule))
    busy = {placement.holder_of(i).rank for i, stage in enumerate(stages) if stage}
    empty = ", ".join(str(rank) for rank in range(ranks) if rank not in busy)
    refuse_unless(
        not empty,
        f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} leaves nothing to pipeline rank "
        f"{empty}; every one of the {ranks} ranks needs a layer, the embedding or the loss in one of its stages",
    )


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
    """Without another instruction all stages are equal; those of an encoder and of its decoder may differ."""
    if args.model_family == "t5":
        _require_equal_stages_of_two_stacks(args)
        return
    uneven = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) != (None, None)
    layers, ranks = counted_layers(args), args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size is None and not uneven and layers is not None:
        refuse_unless(
            args.pipeline_model_parallel_layout is not None or layers % ranks == 0,
            f"--num-layers {args.num_layers or args.encoder_num_layers} (counted as {layers}) does not "
            f"divide by --pipeline-model-parallel-size {ranks}; --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers allow uneven stages",
        )


def _require_equal_stages_of_two_stacks(args: argparse.Namespace) -> None:
    stacks = (
        ("--encoder-num-layers", args.num_layers or args.encoder_num_layers, "--encoder-pipeline-model-parallel-size"),
        ("--decoder-num-layers", args.decoder_num_layers, "--pipeline-model-parallel-size"),
    )
    sizes = (args.encoder_pipeline_model_parallel_size or 1, args.pipeline_model_parallel_size)
    for (flag, layers, stages_flag), stages in zip(stacks, sizes):
        refuse_unless(
            layers is None or layers % stages == 0, f"{flag} {layers} does not divide by {stages_flag} {stages}"
        )


def derive_chunks_of_schedule(args: argparse.Namespace) -> None:
    """A schedule is made for one model chunk on each rank, for two, or for any number of them."""
    name, chunks = args.pipeline_schedule, args.virtual_pipeline_model_parallel_size
    if name == "auto":
        return
    refuse_unless(
        args.encoder_pipeline_model_parallel_size + args.pipeline_model_parallel_size > 1,
        f"--pipeline-schedule {name} needs --pipeline-model-parallel-size of at least 2",
    )
    ways = "--num-virtual-stages-per-pipeline-rank, --num-layers-per-virtual-pipeline-stage or a layout"
    if name == "zb-v":
        if chunks is None:
            chunks = args.virtual_pipeline_model_parallel_size = 2
        wanted, fits = "2 model chunks on each rank (its default)", chunks == 2
    elif name == "interleaved":
        wanted, fits = f"several model chunks on each rank ({ways})", (chunks or 1) > 1
    else:
        wanted, fits = f"one model chunk on each rank (without {ways})", (chunks or 1) == 1
    refuse_unless(fits, f"--pipeline-schedule {name} needs {wanted}, found {chunks or 1}")


def require_layers_fit_chunks(args: argparse.Namespace) -> None:
    """Model chunks are equal, unless a layout or counts for the edge stages say otherwise."""
    chunks, ranks = args.virtual_pipeline_model_parallel_size, args.pipeline_model_parallel_size
    layers = counted_layers(args)
    if chunks is None or layers is None or _places_layers(args):
        return
    refuse_unless(chunks >= 1, f"--num-virtual-stages-per-pipeline-rank ({chunks}) must be at least 1")
    fitting = [n for n in range(1, layers // ranks + 1) if layers % (ranks * n) == 0]
    works = f"numbers that divide: {', '.join(map(str, fitting))}; " if fitting else ""
    refuse_unless(
        layers % (ranks * chunks) == 0,
        f"{layers} layers do not divide by {ranks} x {chunks}, --pipeline-model-parallel-size times model chunks on "
        f"each rank; {works}--pipeline-model-parallel-layout places layers freely",
    )


def _places_layers(args: argparse.Namespace) -> bool:
    edges = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers)
    return args.pipeline_model_parallel_layout is not None or edges != (None, None)


def require_stages_for_chunks(args: argparse.Namespace) -> None:
    """Interleaving needs a neighbour to send to."""
    if args.virtual_pipeline_model_parallel_size is not None:
        refuse_unless(
            args.pipeline_model_parallel_size >= 2,
            "model chunks need --pipeline-model-parallel-size of at least 2, found "
            f"{args.pipeline_model_parallel_size}",
        )


def require_microbatches_for_interleaving(args: argparse.Namespace) -> None:
    """Microbatches run on a chunk in turns, none of which may be shorter than the pipeline is long."""
    if args.virtual_pipeline_model_parallel_size is None or args.pipeline_schedule not in ("auto", "interleaved"):
        return
    ranks, given = args.pipeline_model_parallel_size, args.microbatch_group_size_per_vp_stage
    turn = ranks if given is None else given
    refuse_unless(
        turn >= ranks,
        f"--microbatch-group-size-per-virtual-pipeline-stage ({turn}) must be at least "
        f"--pipeline-model-parallel-size ({ranks})",
    )
    samples = args.micro_batch_size * args.data_parallel_size
    for batch in _batch_sizes(args):
        found = batch // samples
        near = _nearest_that_fill(found, turn, ranks)
        refuse_unless(
            fills_turns(found, turn, ranks),
            f"{_microbatches(found)} (a batch of {batch} / --micro-batch-size {args.micro_batch_size} / data parallel "
            f"size {args.data_parallel_size}) cannot fill an interleaved pipeline: {turn} run on a model chunk before "
            "the next chunk's turn (--microbatch-group-size-per-virtual-pipeline-stage), and no turn may have fewer "
            f"than the {ranks} stages; {' or '.join(map(_microbatches, near))} would work, --global-batch-size "
            f"{' or '.join(str(n * samples) for n in near)}",
        )


def _microbatches(count: int) -> str:
    return f"{count} microbatch{'es' if count != 1 else ''}"


def fills_turns(num_microbatches: int, turn: int, num_ranks: int) -> bool:
    """Whether the last turn is full, or long enough for the first rank to find its input when it needs it."""
    rest = num_microbatches % turn
    return num_microbatches >= turn and (rest == 0 or rest >= num_ranks)


def _nearest_that_fill(found: int, turn: int, ranks: int) -> list[int]:
    """Numbers of microbatches below and above."""
    below = next((n for n in range(found - 1, 0, -1) if fills_turns(n, turn, ranks)), None)
    above = next(n for n in range(found + 1, found + turn + 1) if fills_turns(n, turn, ranks))
    return [above] if below is None else [below, above]


def _batch_sizes(args: argparse.Namespace) -> Iterator[int]:
    """Every batch size of the run."""
    if args.rampup_batch_size is not None:
        start, increment, _ = map(int, args.rampup_batch_size)
        yield from range(start, args.global_batch_size, increment)
    yield args.global_batch_size


def drop_overlap_without_chunks(args: argparse.Namespace) -> None:
    """Only interleaved and zero-bubble schedules have room to overlap stage traffic, and only chunks align gathers."""
    if args.virtual_pipeline_model_parallel_size is None:
        args.align_param_gather = False
        if args.pipeline_schedule != "zb-h1":
            args.overlap_p2p_comm = False


def require_overlap_for_warmup_flush(args: argparse.Namespace) -> None:
    """Overlap in the warmup and drain phases extends the overlap of the steady phase."""
    refuse_unless(
        args.overlap_p2p_comm or not args.overlap_p2p_comm_warmup_flush,
        "--overlap-p2p-communication-warmup-flush needs several model chunks on each rank or --pipeline-schedule "
        "zb-h1, and excludes --no-overlap-p2p-communication",
    )


def require_deferral_fits(args: argparse.Namespace) -> None:
    """Only a pipeline has a drain phase; the work postponed to it ends in the gradient buffer."""
    if args.defer_embedding_wgrad_compute:
        refuse_unless(
            args.pipeline_model_parallel_size > 1,
            "--defer-embedding-wgrad-compute needs --pipeline-model-parallel-size of at least 2",
        )
        refuse_unless(
            args.gradient_accumulation_fusion,
            "--defer-embedding-wgrad-compute excludes --no-gradient-accumulation-fusion",
        )
    refuse_unless(
        args.defer_embedding_wgrad_compute or not args.wgrad_deferral_limit,
        f"--wgrad-deferral-limit ({args.wgrad_deferral_limit}) needs --defer-embedding-wgrad-compute",
    )


PIPELINE_CHUNK_RULES = (
    require_one_way_to_chunks,
    derive_chunks_from_layout,
    derive_chunks_from_layer_count,
    derive_chunks_from_their_number,
    derive_chunks_of_schedule,
    require_layers_on_every_rank,
    require_layers_fit_stages,
    require_layers_fit_chunks,
    require_stages_for_chunks,
    require_microbatches_for_interleaving,
    drop_overlap_without_chunks,
    require_overlap_for_warmup_flush,
    require_deferral_fits,
)
