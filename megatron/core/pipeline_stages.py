"""Which part of a pipeline this process holds: the model chunk that is being built, first and last stage, the stages
of an encoder and of its decoder. `parallel_state` is where these functions have their public names.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron.core.layout_state import created_ranks, layout, rank_in, size_of
from megatron.core.stage_placement import Placement


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Number of model chunks of a rank, None without interleaving."""
    return layout.virtual_pipeline_size


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Set the number of model chunks of a rank."""
    layout.virtual_pipeline_size = world_size


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """The model chunk being built, None without interleaving."""
    return layout.virtual_pipeline_rank


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Set the model chunk being built."""
    layout.virtual_pipeline_rank = rank


def stage_placement() -> Placement:
    """Which pipeline rank holds which virtual stage."""
    return Placement(size_of("pp"), layout.virtual_pipeline_size or 1, layout.placement_shape)


def _is_end_of_pipeline(stage: int, ignore_virtual: bool, vp_stage: int | None) -> bool:
    holder = stage_placement().holder_of(stage)
    if not ignore_virtual and layout.virtual_pipeline_size is not None:
        chunk = layout.virtual_pipeline_rank if vp_stage is None else vp_stage
        if chunk != holder.chunk:
            return False
    return rank_in("pp") == holder.rank


def is_pipeline_first_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank holds the first stage (and, unless ignored, `vp_stage` is the chunk that does)."""
    return _is_end_of_pipeline(0, ignore_virtual, vp_stage)


def is_pipeline_last_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank holds the last stage (and, unless ignored, `vp_stage` is the chunk that does)."""
    return _is_end_of_pipeline(stage_placement().num_stages - 1, ignore_virtual, vp_stage)


def is_rank_in_embedding_group(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank (and chunk, unless ignored) holds the tied word embedding."""
    ranks = created_ranks("embd")
    rank = dist.get_rank()
    if ignore_virtual or rank not in ranks:
        return rank in ranks
    if rank == ranks[0] and is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage):
        return True
    return rank == ranks[-1] and is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def is_rank_in_position_embedding_group() -> bool:
    """Whether this rank holds position embeddings."""
    return dist.get_rank() in created_ranks("pos_embd")


def is_inside_encoder(rank: int | None = None) -> bool:
    """Whether pipeline rank `rank` (this one's) holds layers of an encoder; true where stages are not parted."""
    return layout.split_rank is None or _pipeline_rank(rank) < layout.split_rank


def is_inside_decoder(rank: int | None = None) -> bool:
    """Whether pipeline rank `rank` (this one's) holds layers of a decoder; true where stages are not parted."""
    return layout.split_rank is None or _pipeline_rank(rank) >= layout.split_rank


def _pipeline_rank(rank: int | None) -> int:
    return rank_in("pp") if rank is None else rank


def get_pipeline_model_parallel_decoder_start() -> int | None:
    """First decoder stage of a pipeline with an encoder before it, else None."""
    return layout.split_rank


def get_pipeline_model_parallel_split_rank() -> int | None:
    """Another name of `get_pipeline_model_parallel_decoder_start`."""
    return layout.split_rank


def set_pipeline_model_parallel_split_rank(rank: int | None) -> None:
    """Pretend that stages before `rank` hold an encoder, for tools that run without processes."""
    layout.split_rank = rank


is_pipeline_stage_before_split = is_inside_encoder
is_pipeline_stage_after_split = is_inside_decoder


def is_pipeline_stage_at_split() -> bool:
    """Whether this rank is the encoder's last stage before its decoder's first."""
    rank = rank_in("pp")
    return layout.split_rank is not None and rank == layout.split_rank - 1
