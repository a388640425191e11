"""Process-wide model-parallel groups: the public face over one default `ProcessGroupCollection`.

`initialize_model_parallel` turns sizes into groups (the arithmetic is in `rank_grid`), the getters read them
back; what a pipeline's stages are asked is in `pipeline_stages`. Library code takes groups as arguments; it comes here
only when it was handed none.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.activity import communicating
from megatron.core.communicators import keep_network_reduction_to, plan_communicators, require_network_reduction
from megatron.core.group_creation import create_group, create_hierarchical_groups, create_process_groups
from megatron.core.layout_state import group_of, group_ranks, layout, rank_in, size_of
from megatron.core.pipeline_stages import (
    get_pipeline_model_parallel_decoder_start,
    get_pipeline_model_parallel_split_rank,
    get_virtual_pipeline_model_parallel_rank,
    get_virtual_pipeline_model_parallel_world_size,
    is_inside_decoder,
    is_inside_encoder,
    is_pipeline_first_stage,
    is_pipeline_last_stage,
    is_pipeline_stage_after_split,
    is_pipeline_stage_at_split,
    is_pipeline_stage_before_split,
    is_rank_in_embedding_group,
    is_rank_in_position_embedding_group,
    set_pipeline_model_parallel_split_rank,
    set_virtual_pipeline_model_parallel_rank,
    set_virtual_pipeline_model_parallel_world_size,
    stage_placement,
)
from megatron.core.process_groups_config import (
    ProcessGroupCollection,
    default_process_groups,
    has_default_process_groups,
    set_default_process_groups,
)
from megatron.core.rank_grid import (
    RankGenerator,
    default_embedding_ranks,
    default_position_embedding_ranks,
    generate_masked_orthogonal_rank_groups,
)
from megatron.core.stage_placement import PlacementShape
from megatron.core.utils import GlobalMemoryBuffer

# Public names of this module whose code lies elsewhere.
__all__ = [
    "RankGenerator",
    "create_group",
    "create_hierarchical_groups",
    "generate_masked_orthogonal_rank_groups",
    "get_pipeline_model_parallel_decoder_start",
    "get_pipeline_model_parallel_split_rank",
    "get_virtual_pipeline_model_parallel_rank",
    "get_virtual_pipeline_model_parallel_world_size",
    "group_ranks",
    "is_inside_decoder",
    "is_inside_encoder",
    "is_pipeline_first_stage",
    "is_pipeline_last_stage",
    "is_pipeline_stage_after_split",
    "is_pipeline_stage_at_split",
    "is_pipeline_stage_before_split",
    "is_rank_in_embedding_group",
    "is_rank_in_position_embedding_group",
    "set_pipeline_model_parallel_split_rank",
    "set_virtual_pipeline_model_parallel_rank",
    "set_virtual_pipeline_model_parallel_world_size",
    "stage_placement",
]


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    pipeline_model_parallel_split_rank: int | None = None,
    pipeline_model_parallel_comm_backend: str | None = None,
    use_sharp: bool = False,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: list[int] | None = None,
    expert_model_parallel_size: int = 1,
    num_distributed_optimizer_instances: int = 1,
    expert_tensor_parallel_size: int | None = None,
    nccl_communicator_config_path: str | None = None,
    distributed_timeout_minutes: float = 30,
    order: str = "tp-cp-ep-dp-pp",
    encoder_tensor_model_parallel_size: int = 0,
    encoder_pipeline_model_parallel_size: int | None = 0,
    get_embedding_ranks: Callable[[list[int], int | None], list[int]] | None = None,
    get_position_embedding_ranks: Callable[[list[int], int | None], list[int]] | None = None,
    create_gloo_process_groups: bool = True,
    high_priority_stream_groups: list[str] | None = None,
    virtual_pipeline_shape: PlacementShape = "loop",
) -> None:
    """Create every process group of the layout and make them the process-wide default.

    Collective over the whole world: all ranks call it with the same arguments. Ranks whose groups consist of
    the same members share one communicator.

    Args:
        use_sharp: let the network's switches reduce for the data x context parallel group (NCCL, SHARP).
        pipeline_model_parallel_comm_backend: of the pipeline groups, if not that of the world.
        nccl_communicator_config_path: YAML file with settings of NCCL for single groups, see `communicators`.
        high_priority_stream_groups: names of groups whose communication goes before that of others, on CUDA.
        virtual_pipeline_shape: how model chunks lie on the pipeline ranks, see `stage_placement.Placement`.
        encoder_pipeline_model_parallel_size: stages of an encoder, before the `pipeline_model_parallel_size` of its
            decoder.
        pipeline_model_parallel_split_rank: the older way to say it: the encoder has so many of the
            `pipeline_model_parallel_size` stages, the decoder the others.
        encoder_tensor_model_parallel_size: 0, or the same as `tensor_model_parallel_size`.

    Raises:
        RuntimeError: torch.distributed is not initialised, groups exist already, or the sizes do not fit the
            world.
        NotImplementedError: an encoder with a tensor parallel size of its own.
        ValueError: the encoder leaves no stage to its decoder, or a communicator is asked for that this process
            cannot make.
    """
    pipeline_size, split_rank = split_pipeline(
        pipeline_model_parallel_size, encoder_pipeline_model_parallel_size, pipeline_model_parallel_split_rank
    )
    if split_rank is not None and virtual_pipeline_model_parallel_size is not None:
        raise NotImplementedError(
            f"virtual_pipeline_model_parallel_size ({virtual_pipeline_model_parallel_size}) with an encoder of "
            f"{split_rank} pipeline stages: model chunks are not built for two stacks; leave it unset"
        )
    _refuse_unbuilt(
        encoder_tensor_model_parallel_size=0
        if encoder_tensor_model_parallel_size == tensor_model_parallel_size
        else encoder_tensor_model_parallel_size,
    )
    if use_sharp:
        require_network_reduction()
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group(...) before initialize_model_parallel(...)")
    if has_default_process_groups():
        raise RuntimeError("model parallel groups exist already; call destroy_model_parallel() first")
    layout.created = create_process_groups(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_size,
        pipeline_model_parallel_split_rank=split_rank,
        context_parallel_size=context_parallel_size,
        hierarchical_context_parallel_sizes=hierarchical_context_parallel_sizes,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        num_distributed_optimizer_instances=num_distributed_optimizer_instances,
        order=order,
        timeout=datetime.timedelta(minutes=distributed_timeout_minutes),
        get_embedding_ranks=get_embedding_ranks or partial(default_embedding_ranks, shape=virtual_pipeline_shape),
        get_position_embedding_ranks=get_position_embedding_ranks or default_position_embedding_ranks,
        communicators=plan_communicators(
            pipeline_model_parallel_comm_backend, nccl_communicator_config_path, high_priority_stream_groups or ()
        ),
    )
    set_default_process_groups(layout.created.groups)
    if use_sharp:
        keep_network_reduction_to(get_data_parallel_group(with_context_parallel=True))
    layout.virtual_pipeline_size = virtual_pipeline_model_parallel_size
    layout.virtual_pipeline_rank = None if virtual_pipeline_model_parallel_size is None else 0
    layout.placement_shape = virtual_pipeline_shape
    layout.split_rank = split_rank


def split_pipeline(size: int, encoder_size: int | None, split_rank: int | None) -> tuple[int, int | None]:
    """(pipeline ranks in all, those of an encoder before its decoder or None) of the two ways to say it.

    >>> split_pipeline(2, 1, None), split_pipeline(3, 0, 1), split_pipeline(2, 0, None)
    ((3, 1), (3, 1), (2, None))

    Raises:
        ValueError: both ways at once, or nothing is left for the decoder.
    """
    if encoder_size and split_rank:
        raise ValueError(
            f"encoder_pipeline_model_parallel_size ({encoder_size}) and pipeline_model_parallel_split_rank "
            f"({split_rank}) say the same in two ways: give one of them"
        )
    if split_rank and split_rank >= size:
        raise ValueError(
            f"pipeline_model_parallel_split_rank ({split_rank}) must leave the decoder some of the "
            f"pipeline_model_parallel_size ({size}) stages"
        )
    return size + (encoder_size or 0), encoder_size or split_rank or None


def _refuse_unbuilt(**values: object) -> None:
    for name, value in values.items():
        if value:
            raise NotImplementedError(f"initialize_model_parallel({name}={value!r}) is not built yet; leave it out")


def destroy_model_parallel() -> None:
    """Forget the groups and shut their communicators down; the world group stays."""
    if layout.created is not None:
        layout.created.destroy()
    set_default_process_groups(None)
    layout.reset()


def get_process_groups() -> ProcessGroupCollection:
    """All default groups of this rank."""
    return default_process_groups()


def model_parallel_is_initialized() -> bool:
    """Whether `initialize_model_parallel` has been called."""
    return has_default_process_groups()


is_initialized = model_parallel_is_initialized


def is_unitialized() -> bool:
    """Whether there are no groups yet (the public name has this spelling)."""
    return not has_default_process_groups()


def _data_name(with_context_parallel: bool, partial_data_parallel: bool) -> str:
    if partial_data_parallel:
        return "intra_dp_cp"
    return "dp_cp" if with_context_parallel else "dp"


def _expert_data_name(partial: bool) -> str:
    return "intra_expt_dp" if partial else "expt_dp"


# --- one group, size or rank each: what the fields are says `ProcessGroupCollection` ---


class _GroupGetter(Protocol):
    def __call__(self, check_initialized: bool = True) -> ProcessGroup: ...


def _group_getter(name: str) -> _GroupGetter:
    return partial(group_of, name)


def _size_getter(name: str) -> Callable[[], int]:
    return partial(size_of, name)


def _rank_getter(name: str) -> Callable[[], int]:
    return partial(rank_in, name)


def _pretend(what: str) -> Callable[[int], None]:
    """Sets a rank or size for tools that run without processes; the groups stay as they are."""
    return partial(_state_override, what)


def _state_override(what: str, value: int) -> None:
    layout.overrides[what] = value


get_model_parallel_group = _group_getter("mp")
get_tensor_model_parallel_group = _group_getter("tp")
get_pipeline_model_parallel_group = _group_getter("pp")
get_context_parallel_group = _group_getter("cp")
get_embedding_group = _group_getter("embd")
get_position_embedding_group = _group_getter("pos_embd")
get_tensor_and_context_parallel_group = _group_getter("tp_cp")
get_expert_model_parallel_group = _group_getter("ep")
get_expert_tensor_parallel_group = _group_getter("expt_tp")
get_expert_tensor_and_model_parallel_group = _group_getter("tp_ep")
get_expert_tensor_model_pipeline_parallel_group = _group_getter("tp_ep_pp")

get_tensor_model_parallel_world_size = _size_getter("tp")
get_pipeline_model_parallel_world_size = _size_getter("pp")
get_context_parallel_world_size = _size_getter("cp")
get_tensor_and_context_parallel_world_size = _size_getter("tp_cp")
get_expert_model_parallel_world_size = _size_getter("ep")
get_expert_tensor_parallel_world_size = _size_getter("expt_tp")
get_expert_tensor_and_model_parallel_world_size = _size_getter("tp_ep")

get_tensor_model_parallel_rank = _rank_getter("tp")
get_pipeline_model_parallel_rank = _rank_getter("pp")
get_context_parallel_rank = _rank_getter("cp")
get_tensor_and_context_parallel_rank = _rank_getter("tp_cp")
get_expert_model_parallel_rank = _rank_getter("ep")
get_expert_tensor_parallel_rank = _rank_getter("expt_tp")
get_expert_tensor_and_model_parallel_rank = _rank_getter("tp_ep")

set_tensor_model_parallel_rank = _pretend("tp_rank")
set_tensor_model_parallel_world_size = _pretend("tp_size")
set_pipeline_model_parallel_rank = _pretend("pp_rank")
set_pipeline_model_parallel_world_size = _pretend("pp_size")
set_data_parallel_rank = _pretend("dp_rank")
set_expert_model_parallel_rank = _pretend("ep_rank")
set_expert_model_parallel_world_size = _pretend("ep_size")
set_expert_tensor_parallel_rank = _pretend("expt_tp_rank")
set_expert_tensor_parallel_world_size = _pretend("expt_tp_size")


# --- with conditions ---


def get_data_parallel_group(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> ProcessGroup:
    """Data parallel, with context parallel folded in on request."""
    return group_of(_data_name(with_context_parallel, partial_data_parallel))


get_data_parallel_group_gloo = get_data_parallel_group
"""Host-side collectives use the same group: objects travel through `torch.distributed`'s own object collectives."""


def get_context_parallel_global_ranks(check_initialized: bool = True) -> list[int]:
    """Global ranks of the context parallel group."""
    return group_ranks("cp")


def get_hierarchical_context_parallel_groups(check_initialized: bool = True) -> list[ProcessGroup]:
    """Levels of hierarchical context parallelism, innermost first."""
    return list(default_process_groups().hcp or ())


def get_tensor_and_data_parallel_group(
    check_initialized: bool = True, with_context_parallel: bool = False
) -> ProcessGroup:
    """Tensor × data (× context)."""
    return group_of("tp_dp_cp" if with_context_parallel else "tp_dp", check_initialized)


def get_amax_reduction_group(with_context_parallel: bool = False, tp_only_amax_red: bool = False) -> ProcessGroup:
    """Ranks over which fp8 amax values are reduced."""
    if tp_only_amax_red:
        return group_of("tp_cp" if with_context_parallel else "tp")
    return group_of("tp_dp_cp" if with_context_parallel else "tp_dp")


def get_expert_data_parallel_group(
    check_initialized: bool = True, partial_expert_data_parallel: bool = False
) -> ProcessGroup:
    """Replicas of the experts."""
    return group_of(_expert_data_name(partial_expert_data_parallel), check_initialized)


def get_data_modulo_expert_parallel_group(partial_expert_data_parallel: bool = False) -> ProcessGroup:
    """Older name of `get_expert_data_parallel_group`."""
    return group_of(_expert_data_name(partial_expert_data_parallel))


def get_expert_data_parallel_group_gloo(partial_expert_data_parallel: bool = False) -> ProcessGroup:
    """Same group as `get_expert_data_parallel_group`."""
    return group_of(_expert_data_name(partial_expert_data_parallel))


def get_inter_distributed_optimizer_instance_group() -> ProcessGroup:
    """Ranks that hold the same shard in different distributed-optimizer instances."""
    return group_of("inter_dist_opt")


def get_intra_distributed_optimizer_instance_group() -> ProcessGroup:
    """All ranks of one distributed-optimizer instance."""
    return group_of("intra_dist_opt")


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor parallel group."""
    return group_ranks("tp")[0]


def get_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor × pipeline group."""
    return group_ranks("mp")[0]


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage of this pipeline."""
    return group_ranks("pp")[0]


def get_pipeline_model_parallel_last_rank() -> int:
    """Global rank of the last rank of this pipeline."""
    return group_ranks("pp")[-1]


def get_pipeline_model_parallel_next_rank() -> int:
    """Global rank of the following stage; the last stage is followed by the first."""
    ranks = group_ranks("pp")
    return ranks[(rank_in("pp") + 1) % len(ranks)]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the preceding stage; the first stage is preceded by the last."""
    ranks = group_ranks("pp")
    return ranks[(rank_in("pp") - 1) % len(ranks)]


def get_data_parallel_world_size(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Number of data parallel ranks."""
    return size_of(_data_name(with_context_parallel, partial_data_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Place of this rank in its data parallel group."""
    return rank_in(_data_name(with_context_parallel, partial_data_parallel))


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of the data parallel group."""
    return group_ranks(_data_name(with_context_parallel, False))[0]


def get_expert_data_parallel_world_size(partial_expert_data_parallel: bool = False) -> int:
    """Number of replicas of the experts."""
    return size_of(_expert_data_name(partial_expert_data_parallel))


def get_expert_data_parallel_rank(partial_expert_data_parallel: bool = False) -> int:
    """Place of this rank among the replicas of its experts."""
    return rank_in(_expert_data_name(partial_expert_data_parallel))


def get_all_ranks() -> str:
    """This rank's place along tp, dp, cp, pp and ep, e.g. `"0_1_0_2_0"`."""
    return "_".join(str(rank_in(name)) for name in ("tp", "dp", "cp", "pp", "ep"))


_memory_buffer: GlobalMemoryBuffer | None = None


def get_global_memory_buffer() -> GlobalMemoryBuffer:
    """Tensors by name that this process reuses; they live until `destroy_global_memory_buffer`."""
    global _memory_buffer
    _memory_buffer = _memory_buffer or GlobalMemoryBuffer()
    return _memory_buffer


def destroy_global_memory_buffer() -> None:
    """Forget those tensors."""
    global _memory_buffer
    _memory_buffer = None


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait for all ranks of `group`, on whatever device they compute."""
    token = torch.zeros(1, device=device.current_device())
    with communicating("barrier", group):
        dist.all_reduce(token, group=group)
    device.synchronize()
