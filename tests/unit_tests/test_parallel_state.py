"""Process groups of real ranks: members, communication, getters, life cycle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state as ps
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rank_grid import RankGenerator, hierarchical_ranks
from tests.worker_pool import RankFailure, run_ranks

DEFAULT_ORDER = "tp-cp-ep-dp-pp"
# getter of the group, of its size and of the rank in it; grid ("dense" or "expert") and axes
GETTERS = [
    ("get_tensor_model_parallel", "dense", "tp"),
    ("get_pipeline_model_parallel", "dense", "pp"),
    ("get_context_parallel", "dense", "cp"),
    ("get_data_parallel", "dense", "dp"),
    ("get_tensor_and_context_parallel", "dense", "tp-cp"),
    ("get_expert_model_parallel", "expert", "ep"),
    ("get_expert_tensor_parallel", "expert", "tp"),
    ("get_expert_tensor_and_model_parallel", "expert", "tp-ep"),
    ("get_expert_data_parallel", "expert", "dp"),
]
GROUPS_ONLY = [
    (ps.get_model_parallel_group, "dense", "tp-pp"),
    (ps.get_tensor_and_data_parallel_group, "dense", "tp-dp"),
    (lambda: ps.get_tensor_and_data_parallel_group(with_context_parallel=True), "dense", "tp-dp-cp"),
    (lambda: ps.get_data_parallel_group(with_context_parallel=True), "dense", "dp-cp"),
    (lambda: ps.get_data_parallel_group_gloo(with_context_parallel=True), "dense", "dp-cp"),
    (ps.get_amax_reduction_group, "dense", "tp-dp"),
    (lambda: ps.get_amax_reduction_group(with_context_parallel=True), "dense", "tp-dp-cp"),
    (lambda: ps.get_amax_reduction_group(tp_only_amax_red=True), "dense", "tp"),
    (lambda: ps.get_amax_reduction_group(True, True), "dense", "tp-cp"),
    (ps.get_expert_tensor_model_pipeline_parallel_group, "expert", "tp-ep-pp"),
    (ps.get_data_modulo_expert_parallel_group, "expert", "dp"),
    (ps.get_expert_data_parallel_group_gloo, "expert", "dp"),
]


def own(groups: list[list[int]]) -> list[int]:
    (mine,) = [group for group in groups if dist.get_rank() in group]
    return mine


def assert_members(group: dist.ProcessGroup, members: list[int]) -> None:
    """The group has these members, and its communicator reaches just them."""
    assert dist.get_process_group_ranks(group) == members
    total = torch.tensor(float(10 ** dist.get_rank()), dtype=torch.float64)
    dist.all_reduce(total, group=group)
    assert float(total) == sum(10**rank for rank in members)


def check_getters(tp: int, cp: int, pp: int, etp: int, ep: int, order: str) -> None:
    ps.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        order=order,
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    grids = {
        "dense": RankGenerator(tp=tp, ep=1, dp=world // (tp * cp * pp), pp=pp, cp=cp, order=order),
        "expert": RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order=order),
    }
    for prefix, grid, axes in GETTERS:
        members = own(grids[grid].get_ranks(axes))
        assert_members(getattr(ps, f"{prefix}_group")(), members)
        assert getattr(ps, f"{prefix}_world_size")() == len(members)
        assert getattr(ps, f"{prefix}_rank")() == members.index(rank)
    for get_group, grid, axes in GROUPS_ONLY:
        assert_members(get_group(), own(grids[grid].get_ranks(axes)))
    data = own(grids["dense"].get_ranks("dp-cp"))
    assert ps.get_data_parallel_world_size(with_context_parallel=True) == len(data)
    assert ps.get_data_parallel_rank(with_context_parallel=True) == data.index(rank)
    assert ps.get_data_parallel_src_rank(with_context_parallel=True) == data[0]
    assert ps.get_data_parallel_src_rank() == own(grids["dense"].get_ranks("dp"))[0]
    assert ps.get_context_parallel_global_ranks() == own(grids["dense"].get_ranks("cp"))
    assert ps.get_tensor_model_parallel_src_rank() == own(grids["dense"].get_ranks("tp"))[0]
    assert ps.get_model_parallel_src_rank() == own(grids["dense"].get_ranks("tp-pp"))[0]
    check_stages(own(grids["dense"].get_ranks("pp")))
    places = [(grid, axis) for grid, axis in zip(["dense"] * 4 + ["expert"], ["tp", "dp", "cp", "pp", "ep"])]
    expected = [own(grids[grid].get_ranks(axis)).index(rank) for grid, axis in places]
    assert ps.get_all_ranks() == "_".join(map(str, expected))


def check_stages(pipeline: list[int]) -> None:
    rank = dist.get_rank()
    stage, last = pipeline.index(rank), len(pipeline) - 1
    assert ps.is_pipeline_first_stage() == (stage == 0)
    assert ps.is_pipeline_last_stage() == (stage == last)
    assert ps.get_pipeline_model_parallel_first_rank() == pipeline[0]
    assert ps.get_pipeline_model_parallel_last_rank() == pipeline[-1]
    assert ps.get_pipeline_model_parallel_next_rank() == pipeline[(stage + 1) % len(pipeline)]
    assert ps.get_pipeline_model_parallel_prev_rank() == pipeline[stage - 1]
    assert ps.is_rank_in_embedding_group() == (stage in (0, last))
    assert ps.is_rank_in_position_embedding_group() == (stage == 0)
    if stage in (0, last):
        assert_members(ps.get_embedding_group(), pipeline[:1] + pipeline[1:][-1:])
    else:
        assert ps.get_embedding_group(check_initialized=False) is None
        with pytest.raises(RuntimeError, match="this rank is in no 'embd' group"):
            ps.get_embedding_group()
    if stage == 0:
        assert_members(ps.get_position_embedding_group(), pipeline[:1])


@pytest.mark.parametrize(
    ("world", "tp", "cp", "pp", "etp", "ep", "order"),
    [
        (1, 1, 1, 1, 1, 1, DEFAULT_ORDER),
        (4, 2, 1, 2, 2, 1, DEFAULT_ORDER),
        (4, 1, 2, 1, 2, 2, DEFAULT_ORDER),
        (4, 1, 1, 4, 1, 1, DEFAULT_ORDER),
        (8, 2, 1, 2, 1, 4, DEFAULT_ORDER),
        (8, 2, 2, 2, 1, 2, DEFAULT_ORDER),
        (8, 1, 1, 2, 1, 1, "tp-cp-ep-pp-dp"),
        (8, 2, 1, 2, 2, 1, "tp-cp-ep-pp-dp"),
    ],
)
def test_groups_and_getters_follow_the_grid(
    world: int, tp: int, cp: int, pp: int, etp: int, ep: int, order: str
) -> None:
    run_ranks(world, check_getters, tp, cp, pp, etp, ep, order)


def check_optimizer_instances() -> None:
    ps.initialize_model_parallel(
        pipeline_model_parallel_size=2, expert_model_parallel_size=2, num_distributed_optimizer_instances=2
    )
    data = own([[0, 1, 2, 3], [4, 5, 6, 7]])
    half = data[:2] if dist.get_rank() in data[:2] else data[2:]
    assert_members(ps.get_data_parallel_group(True, partial_data_parallel=True), half)
    assert ps.get_data_parallel_world_size(True, partial_data_parallel=True) == 2
    # experts: ep pairs (0, 1), (2, 3), ...; their replicas (0, 2), (1, 3), ... fall into two instances of one
    assert_members(ps.get_expert_data_parallel_group(), own([[0, 2], [1, 3], [4, 6], [5, 7]]))
    assert_members(ps.get_expert_data_parallel_group(partial_expert_data_parallel=True), own([[i] for i in range(8)]))
    assert ps.get_expert_data_parallel_rank(partial_expert_data_parallel=True) == 0
    inter = ps.get_inter_distributed_optimizer_instance_group()
    assert_members(inter, own([[0, 2], [1, 3], [4, 6], [5, 7]]))
    assert_members(ps.get_intra_distributed_optimizer_instance_group(), own([[0, 1, 4, 5], [2, 3, 6, 7]]))


def test_distributed_optimizer_instances_cut_the_replicas() -> None:
    run_ranks(8, check_optimizer_instances)


def check_hierarchical_context() -> None:
    ps.initialize_model_parallel(context_parallel_size=8, hierarchical_context_parallel_sizes=[2, 4])
    inner, outer = ps.get_hierarchical_context_parallel_groups()
    levels = hierarchical_ranks(list(range(8)), [2, 4])
    assert_members(inner, own(levels[0]))
    assert_members(outer, own(levels[1]))


def test_hierarchical_context_groups() -> None:
    run_ranks(8, check_hierarchical_context)


def check_shared_communicators() -> int:
    ps.initialize_model_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    groups = ps.get_process_groups()
    assert groups.tp is groups.tp_cp is groups.expt_tp is groups.tp_dp
    assert groups.pp is groups.embd
    assert groups.dp is groups.cp is groups.ep is groups.pos_embd or not ps.is_pipeline_first_stage()
    assert groups.dp is groups.dp_cp is groups.intra_dp_cp
    communicators = {id(g) for g in vars(groups).values() if isinstance(g, dist.ProcessGroup)}
    return len(communicators)


def test_groups_of_the_same_members_share_one_communicator() -> None:
    assert run_ranks(4, check_shared_communicators) == [4, 4, 4, 4]  # alone, tp pair, pp pair, all


def check_custom_embedding_ranks() -> None:
    ps.initialize_model_parallel(
        pipeline_model_parallel_size=4,
        get_embedding_ranks=lambda ranks, split: ranks[:2],
        get_position_embedding_ranks=lambda ranks, split: ranks[1:3],
    )
    rank = dist.get_rank()
    assert ps.is_rank_in_embedding_group() == (rank < 2)
    assert ps.is_rank_in_position_embedding_group() == (rank in (1, 2))
    if rank < 2:
        assert_members(ps.get_embedding_group(), [0, 1])
    if rank in (1, 2):
        assert_members(ps.get_position_embedding_group(), [1, 2])


def test_a_model_may_choose_which_stages_hold_embeddings() -> None:
    run_ranks(4, check_custom_embedding_ranks)


def check_life_cycle() -> None:
    assert ps.is_unitialized()
    assert not ps.is_initialized()
    assert ps.get_tensor_model_parallel_world_size() == 1
    assert ps.get_tensor_model_parallel_group(check_initialized=False) is None
    with pytest.raises(RuntimeError, match="call parallel_state.initialize_model_parallel"):
        ps.get_tensor_model_parallel_group()
    ps.initialize_model_parallel(tensor_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    ps.set_tensor_model_parallel_rank(7)
    with pytest.raises(RuntimeError, match="destroy_model_parallel"):
        ps.initialize_model_parallel()
    ps.barrier()
    ps.destroy_model_parallel()
    assert ps.is_unitialized()
    assert ps.get_tensor_model_parallel_rank() == 0  # the pretended rank is forgotten, too
    assert ps.get_virtual_pipeline_model_parallel_world_size() is None
    ps.initialize_model_parallel(pipeline_model_parallel_size=2)
    assert ps.is_initialized()
    assert ps.get_tensor_model_parallel_world_size() == 1
    assert_members(ps.get_pipeline_model_parallel_group(), own([[0, 2], [1, 3]]))
    assert_members(dist.group.WORLD, [0, 1, 2, 3])


def test_groups_can_be_destroyed_and_made_anew() -> None:
    run_ranks(4, check_life_cycle)


def check_overrides() -> None:
    ps.initialize_model_parallel(tensor_model_parallel_size=2)
    for name in (
        "tensor_model_parallel",
        "pipeline_model_parallel",
        "expert_model_parallel",
        "expert_tensor_parallel",
    ):
        getattr(ps, f"set_{name}_world_size")(16)
        getattr(ps, f"set_{name}_rank")(11)
        assert getattr(ps, f"get_{name}_world_size")() == 16
        assert getattr(ps, f"get_{name}_rank")() == 11
    ps.set_data_parallel_rank(5)
    assert ps.get_data_parallel_rank() == 5
    assert not ps.is_pipeline_first_stage()
    ps.set_pipeline_model_parallel_rank(15)
    assert ps.is_pipeline_last_stage()
    assert dist.get_world_size(ps.get_tensor_model_parallel_group()) == 2  # the groups stay


def test_tools_can_pretend_ranks_and_sizes() -> None:
    run_ranks(2, check_overrides)


def check_virtual_stages() -> None:
    ps.initialize_model_parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)
    stage = dist.get_rank()
    assert ps.get_virtual_pipeline_model_parallel_world_size() == 3
    assert ps.get_virtual_pipeline_model_parallel_rank() == 0
    for chunk in range(3):
        ps.set_virtual_pipeline_model_parallel_rank(chunk)
        first, last = stage == 0 and chunk == 0, stage == 1 and chunk == 2
        assert ps.is_pipeline_first_stage(ignore_virtual=False) == first
        assert ps.is_pipeline_last_stage(ignore_virtual=False) == last
        assert ps.is_pipeline_first_stage() == (stage == 0)
        assert ps.is_pipeline_last_stage() == (stage == 1)
        assert ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=0) == (stage == 0)
        assert ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=2) == (stage == 1)
        assert ps.is_rank_in_embedding_group(ignore_virtual=False) == (first or last)
        assert ps.is_rank_in_embedding_group()


def test_first_and_last_of_virtual_stages() -> None:
    run_ranks(2, check_virtual_stages)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            r"world size 4 is not a multiple of tensor 3 × pipeline 1 × context 1",
        ),
        (
            {"pipeline_model_parallel_size": 2, "context_parallel_size": 4},
            r"world size 4 .* pipeline 2 × context 4 = 8",
        ),
        (
            {"expert_model_parallel_size": 3},
            r"world size 4 is not a multiple of expert tensor 1 × expert 3 × pipeline 1",
        ),
        (
            {"num_distributed_optimizer_instances": 3},
            r"num_distributed_optimizer_instances \(3\) must divide data size 4",
        ),
        (
            {"expert_model_parallel_size": 4, "num_distributed_optimizer_instances": 2},
            r"\(2\) must divide expert data size 1",
        ),
        (
            {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"},
            r"put pp last in the order",
        ),
        (
            {"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 3]},
            r"\[2, 3\] multiply to 6, not to 4",
        ),
        ({"use_sharp": True}, r"use_sharp needs NCCL on a network that reduces \(SHARP\), found gloo"),
        ({"high_priority_stream_groups": ["dp"]}, r"priorities of streams .* need NCCL"),
        ({"encoder_tensor_model_parallel_size": 2}, r"encoder_tensor_model_parallel_size=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_on_every_rank(sizes: dict[str, Any], message: str) -> None:
    run_ranks(4, check_refused, sizes, message)


def check_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        ps.initialize_model_parallel(**sizes)
    assert ps.is_unitialized()


def test_torch_distributed_must_run() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        ps.initialize_model_parallel()


def check_collection() -> None:
    with pytest.raises(RuntimeError, match="or hand groups in"):
        ProcessGroupCollection.from_parallel_state()
    ps.initialize_model_parallel(tensor_model_parallel_size=2)
    chosen = ProcessGroupCollection.use_mpu_process_groups(["tp", "dp_cp"])
    assert chosen.tp is ps.get_tensor_model_parallel_group()
    assert chosen.dp_cp is ps.get_data_parallel_group(with_context_parallel=True)
    assert chosen.pp is None
    assert chosen.replace(pp=chosen.tp).pp is chosen.tp
    assert chosen.pp is None


def test_groups_as_a_value() -> None:
    run_ranks(2, check_collection)


def test_a_failure_shows_the_ranks_traceback() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2"):
        run_ranks(2, fail_on_the_second_rank)


def fail_on_the_second_rank() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
