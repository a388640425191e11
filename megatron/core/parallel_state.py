"""Process-wide model-parallel groups: the public face over one default `ProcessGroupCollection`.

`initialize_model_parallel` turns sizes into groups (the arithmetic is in `rank_grid`), the getters read them
back. Library code takes groups as arguments; it comes here only when it was handed none.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.activity import communicating
from megatron.core.communicators import keep_network_reduction_to, plan_communicators, require_network_reduction
from megatron.core.group_creation import CreatedGroups, create_process_groups
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
    hierarchical_ranks,
)
from megatron.core.stage_placement import Placement, PlacementShape
from megatron.core.utils import GlobalMemoryBuffer

__all__ = ["RankGenerator", "generate_masked_orthogonal_rank_groups"]


@dataclass
class _State:
    """What `initialize_model_parallel` leaves behind besides the groups."""

    created: CreatedGroups | None = None
    virtual_pipeline_size: int | None = None
    virtual_pipeline_rank: int | None = None
    placement_shape: PlacementShape = "loop"
    split_rank: int | None = None
    """Pipeline ranks before this one hold an encoder, the others its decoder; None where stages are not parted."""
    overrides: dict[str, int] = field(default_factory=dict)
    """Ranks and sizes pretended by the `set_*` functions, for tools that run without processes."""


_state = _State()


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
    _state.created = create_process_groups(
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
    set_default_process_groups(_state.created.groups)
    if use_sharp:
        keep_network_reduction_to(get_data_parallel_group(with_context_parallel=True))
    _state.virtual_pipeline_size = virtual_pipeline_model_parallel_size
    _state.virtual_pipeline_rank = None if virtual_pipeline_model_parallel_size is None else 0
    _state.placement_shape = virtual_pipeline_shape
    _state.split_rank = split_rank


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
    global _state
    if _state.created is not None:
        _state.created.destroy()
    set_default_process_groups(None)
    _state = _State()


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


def _group(name: str, check_initialized: bool = True) -> ProcessGroup:
    """Group `name` of this rank, None only where not checked."""
    if not check_initialized and not has_default_process_groups():
        return None  # type: ignore[return-value]
    group = getattr(default_process_groups(), name)
    if group is None and check_initialized:
        raise RuntimeError(f"this rank is in no {name!r} group of the present layout")
    return group


def group_ranks(name: str) -> list[int]:
    """Global ranks of this rank's group `name`, a field of `ProcessGroupCollection`."""
    default_process_groups()
    assert _state.created is not None
    return _state.created.ranks[name]


def _created_ranks(name: str) -> list[int]:
    """As `group_ranks`; empty where this rank is in no such group."""
    return [] if _state.created is None else _state.created.ranks.get(name, [])


def _size(name: str) -> int:
    if f"{name}_size" in _state.overrides:
        return _state.overrides[f"{name}_size"]
    return _group(name).size() if dist.is_initialized() and has_default_process_groups() else 1


def _rank(name: str) -> int:
    if f"{name}_rank" in _state.overrides:
        return _state.overrides[f"{name}_rank"]
    return _group(name).rank() if dist.is_initialized() and has_default_process_groups() else 0


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
    return partial(_group, name)


def _size_getter(name: str) -> Callable[[], int]:
    return partial(_size, name)


def _rank_getter(name: str) -> Callable[[], int]:
    return partial(_rank, name)


def _pretend(what: str) -> Callable[[int], None]:
    """Sets a rank or size for tools that run without processes; the groups stay as they are."""
    return partial(_state_override, what)


def _state_override(what: str, value: int) -> None:
    _state.overrides[what] = value


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
    return _group(_data_name(with_context_parallel, partial_data_parallel))


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
    return _group("tp_dp_cp" if with_context_parallel else "tp_dp", check_initialized)


def get_amax_reduction_group(with_context_parallel: bool = False, tp_only_amax_red: bool = False) -> ProcessGroup:
    """Ranks over which fp8 amax values are reduced."""
    if tp_only_amax_red:
        return _group("tp_cp" if with_context_parallel else "tp")
    return _group("tp_dp_cp" if with_context_parallel else "tp_dp")


def get_expert_data_parallel_group(
    check_initialized: bool = True, partial_expert_data_parallel: bool = False
) -> ProcessGroup:
    """Replicas of the experts."""
    return _group(_expert_data_name(partial_expert_data_parallel), check_initialized)


def get_data_modulo_expert_parallel_group(partial_expert_data_parallel: bool = False) -> ProcessGroup:
    """Older name of `get_expert_data_parallel_group`."""
    return _group(_expert_data_name(partial_expert_data_parallel))


def get_expert_data_parallel_group_gloo(partial_expert_data_parallel: bool = False) -> ProcessGroup:
    """Same group as `get_expert_data_parallel_group`."""
    return _group(_expert_data_name(partial_expert_data_parallel))


def get_inter_distributed_optimizer_instance_group() -> ProcessGroup:
    """Ranks that hold the same shard in different distributed-optimizer instances."""
    return _group("inter_dist_opt")


def get_intra_distributed_optimizer_instance_group() -> ProcessGroup:
    """All ranks of one distributed-optimizer instance."""
    return _group("intra_dist_opt")


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
    return ranks[(_rank("pp") + 1) % len(ranks)]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the preceding stage; the first stage is preceded by the last."""
    ranks = group_ranks("pp")
    return ranks[(_rank("pp") - 1) % len(ranks)]


def get_data_parallel_world_size(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Number of data parallel ranks."""
    return _size(_data_name(with_context_parallel, partial_data_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Place of this rank in its data parallel group."""
    return _rank(_data_name(with_context_parallel, partial_data_parallel))


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of the data parallel group."""
    return group_ranks(_data_name(with_context_parallel, False))[0]


def get_expert_data_parallel_world_size(partial_expert_data_parallel: bool = False) -> int:
    """Number of replicas of the experts."""
    return _size(_expert_data_name(partial_expert_data_parallel))


def get_expert_data_parallel_rank(partial_expert_data_parallel: bool = False) -> int:
    """Place of this rank among the replicas of its experts."""
    return _rank(_expert_data_name(partial_expert_data_parallel))


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Number of model chunks of a rank, None without interleaving."""
    return _state.virtual_pipeline_size


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Set the number of model chunks of a rank."""
    _state.virtual_pipeline_size = world_size


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """The model chunk being built, None without interleaving."""
    return _state.virtual_pipeline_rank


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Set the model chunk being built."""
    _state.virtual_pipeline_rank = rank


def stage_placement() -> Placement:
    """Which pipeline rank holds which virtual stage."""
    return Placement(_size("pp"), _state.virtual_pipeline_size or 1, _state.placement_shape)


def _is_end_of_pipeline(stage: int, ignore_virtual: bool, vp_stage: int | None) -> bool:
    holder = stage_placement().holder_of(stage)
    if not ignore_virtual and _state.virtual_pipeline_size is not None:
        chunk = _state.virtual_pipeline_rank if vp_stage is None else vp_stage
        if chunk != holder.chunk:
            return False
    return _rank("pp") == holder.rank


def is_pipeline_first_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank holds the first stage (and, unless ignored, `vp_stage` is the chunk that does)."""
    return _is_end_of_pipeline(0, ignore_virtual, vp_stage)


def is_pipeline_last_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank holds the last stage (and, unless ignored, `vp_stage` is the chunk that does)."""
    return _is_end_of_pipeline(stage_placement().num_stages - 1, ignore_virtual, vp_stage)


def is_rank_in_embedding_group(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
    """Whether this rank (and chunk, unless ignored) holds the tied word embedding."""
    ranks = _created_ranks("embd")
    rank = dist.get_rank()
    if ignore_virtual or rank not in ranks:
        return rank in ranks
    if rank == ranks[0] and is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage):
        return True
    return rank == ranks[-1] and is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def is_rank_in_position_embedding_group() -> bool:
    """Whether this rank holds position embeddings."""
    return dist.get_rank() in _created_ranks("pos_embd")


def is_inside_encoder(rank: int | None = None) -> bool:
    """Whether pipeline rank `rank` (this one's) holds layers of an encoder; true where stages are not parted."""
    return _state.split_rank is None or _pipeline_rank(rank) < _state.split_rank


def is_inside_decoder(rank: int | None = None) -> bool:
    """Whether pipeline rank `rank` (this one's) holds layers of a decoder; true where stages are not parted."""
    return _state.split_rank is None or _pipeline_rank(rank) >= _state.split_rank


def _pipeline_rank(rank: int | None) -> int:
    return get_pipeline_model_parallel_rank() if rank is None else rank


def get_pipeline_model_parallel_decoder_start() -> int | None:
    """First decoder stage of a pipeline with an encoder before it, else None."""
    return _state.split_rank


def get_pipeline_model_parallel_split_rank() -> int | None:
    """Another name of `get_pipeline_model_parallel_decoder_start`."""
    return _state.split_rank


def get_all_ranks() -> str:
    """This rank's place along tp, dp, cp, pp and ep, e.g. `"0_1_0_2_0"`."""
    return "_".join(str(_rank(name)) for name in ("tp", "dp", "cp", "pp", "ep"))


def set_pipeline_model_parallel_split_rank(rank: int | None) -> None:
    """Pretend that stages before `rank` hold an encoder, for tools that run without processes."""
    _state.split_rank = rank


is_pipeline_stage_before_split = is_inside_encoder
is_pipeline_stage_after_split = is_inside_decoder


def is_pipeline_stage_at_split() -> bool:
    """Whether this rank is the encoder's last stage before its decoder's first."""
    rank = get_pipeline_model_parallel_rank()
    return _state.split_rank is not None and rank == _state.split_rank - 1


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


def create_hierarchical_groups(
    rank: int,
    ranks: list[int],
    hierarchical_group_sizes: list[int],
    create_gloo_process_groups: bool = False,
    pg_options: Any = None,
    timeout: datetime.timedelta | None = None,
    group_desc: str | None = None,
) -> tuple[list[ProcessGroup], list[ProcessGroup]]:
    """This rank's group of each level of a hierarchy over `ranks`, innermost first; the same on gloo, if asked for.

    Collective over the whole world, which makes all groups; `rank` is this rank.
    """
    levels = hierarchical_ranks(ranks, hierarchical_group_sizes)
    made: list[list[ProcessGroup]] = [[], []]
    backends = [device.communication_backend(), *(["gloo"] if create_gloo_process_groups else [])]
    for groups in levels:
        for members in groups:
            for found, backend in zip(made, backends):
                options = pg_options if backend != "gloo" else None
                group = dist.new_group(members, timeout, backend, options, group_desc=group_desc)
                if rank in members:
                    found.append(group)
    return made[0], made[1]


def create_group(
    ranks: list[int] | None = None,
    timeout: datetime.timedelta | None = None,
    backend: str | None = None,
    group_desc: str | None = None,
) -> ProcessGroup:
    """`torch.distributed.new_group` on the backend of this device."""
    return dist.new_group(
        ranks, timeout=timeout, backend=backend or device.communication_backend(), group_desc=group_desc
    )


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait for all ranks of `group`, on whatever device they compute."""
    token = torch.zeros(1, device=device.current_device())
    with communicating("barrier", group):
        dist.all_reduce(token, group=group)
    device.synchronize()
