"""The arithmetic of rank layouts: tabled examples, and brute force over small sizes."""

from __future__ import annotations

from itertools import permutations, product
from math import prod

import pytest

from megatron.core.rank_grid import (
    RankGenerator,
    default_embedding_ranks,
    default_position_embedding_ranks,
    dense_layout,
    expert_layout,
    generate_masked_orthogonal_rank_groups,
    group_plan,
    hierarchical_ranks,
    ranks_along,
)

DENSE = {"tp": 2, "cp": 1, "ep": 1, "dp": 2, "pp": 4}
DENSE_CP = {"tp": 2, "cp": 2, "ep": 1, "dp": 2, "pp": 2}
EXPERTS = {"tp": 1, "cp": 1, "ep": 4, "dp": 2, "pp": 2}
EXPERTS_TP = {"tp": 2, "cp": 1, "ep": 2, "dp": 2, "pp": 2}
DEFAULT_ORDER = "tp-cp-ep-dp-pp"

PAIRS = [[i, i + 1] for i in range(0, 16, 2)]
QUADS = [[i, i + 1, i + 2, i + 3] for i in range(0, 16, 4)]
STRIDE_2 = [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
STRIDE_4 = [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
STRIDE_8 = [[i, i + 8] for i in range(8)]

EXAMPLES = [
    (DENSE, DEFAULT_ORDER, "tp", PAIRS),
    (DENSE, DEFAULT_ORDER, "pp", [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]),
    (DENSE, DEFAULT_ORDER, "dp", STRIDE_2),
    (DENSE, DEFAULT_ORDER, "tp-pp", [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
    (DENSE_CP, DEFAULT_ORDER, "cp", STRIDE_2),
    (DENSE_CP, DEFAULT_ORDER, "dp", STRIDE_4),
    (DENSE_CP, DEFAULT_ORDER, "pp", STRIDE_8),
    (DENSE_CP, DEFAULT_ORDER, "dp-cp", [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]),
    (DENSE_CP, DEFAULT_ORDER, "tp-pp", [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]),
    (DENSE_CP, DEFAULT_ORDER, "tp-cp", QUADS),
    (DENSE_CP, DEFAULT_ORDER, "tp-dp-cp", [list(range(8)), list(range(8, 16))]),
    (EXPERTS, DEFAULT_ORDER, "ep", QUADS),
    (EXPERTS, DEFAULT_ORDER, "dp", STRIDE_4),
    (EXPERTS, DEFAULT_ORDER, "tp-ep-pp", [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
    (EXPERTS_TP, DEFAULT_ORDER, "ep", STRIDE_2),
    (EXPERTS_TP, DEFAULT_ORDER, "dp", STRIDE_4),
    (EXPERTS_TP, DEFAULT_ORDER, "tp-ep", QUADS),
    (DENSE, "tp-cp-ep-pp-dp", "pp", [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]),
    (DENSE, "tp-cp-ep-pp-dp", "dp", STRIDE_8),
]


@pytest.mark.parametrize(("sizes", "order", "token", "groups"), EXAMPLES)
def test_tabled_examples_of_16_ranks(sizes: dict[str, int], order: str, token: str, groups: list[list[int]]) -> None:
    assert RankGenerator(**sizes, order=order).get_ranks(token) == groups


def groups_by_definition(sizes: dict[str, int], chosen: tuple[str, ...]) -> list[list[int]]:
    """rank = sum(index * stride); ranks that share the indices of the other axes form a group."""
    strides = {axis: prod(list(sizes.values())[:i]) for i, axis in enumerate(sizes)}
    slow_first = list(sizes)[::-1]
    groups: dict[tuple[int, ...], list[int]] = {}
    for indices in product(*(range(sizes[axis]) for axis in slow_first)):
        index = dict(zip(slow_first, indices))
        rank = sum(index[axis] * strides[axis] for axis in sizes)
        groups.setdefault(tuple(index[axis] for axis in slow_first if axis not in chosen), []).append(rank)
    return list(groups.values())


@pytest.mark.parametrize("axis_sizes", [(2, 3, 1, 2), (1, 1, 1, 1), (3, 1, 2, 4), (2, 2, 2, 2)])
def test_groups_follow_from_indices_times_strides(axis_sizes: tuple[int, ...]) -> None:
    for names in permutations(("tp", "cp", "dp", "pp")):
        sizes = dict(zip(names, axis_sizes))
        for count in range(1, 5):
            for chosen in permutations(names, count):
                assert ranks_along("-".join(chosen), sizes) == groups_by_definition(sizes, chosen)


def test_every_rank_is_in_exactly_one_group() -> None:
    generator = RankGenerator(tp=2, ep=3, dp=2, pp=2, cp=1, order=DEFAULT_ORDER)
    for token in ("tp", "ep", "dp", "pp", "tp-pp", "tp-ep-pp", "dp-cp", "tp-ep-dp-pp"):
        assert sorted(sum(generator.get_ranks(token), [])) == list(range(24))
    assert generator.world_size == 24


def test_offset_moves_all_ranks() -> None:
    here = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=1, order=DEFAULT_ORDER)
    there = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=1, order=DEFAULT_ORDER, rank_offset=5)
    assert there.get_ranks("dp") == [[rank + 5 for rank in group] for group in here.get_ranks("dp")]


def test_axes_of_size_one_may_be_left_out_of_the_order() -> None:
    generator = RankGenerator(tp=2, ep=1, dp=2, pp=1, cp=1, order="tp-dp")
    assert generator.get_ranks("pp") == [[0], [1], [2], [3]]
    assert generator.get_ranks("dp") == [[0, 2], [1, 3]]


def test_larger_axes_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"'tp-dp' does not name pp, whose size is 2"):
        RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=1, order="tp-dp")


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['xp'\]"):
        RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=1, order=DEFAULT_ORDER).get_ranks("tp-xp")


def test_hierarchical_levels_of_the_tabled_example() -> None:
    inner, middle, outer = hierarchical_ranks(list(range(16)), [2, 2, 4])
    assert inner == PAIRS
    assert middle[:3] == [[0, 2], [1, 3], [4, 6]]
    assert outer == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


@pytest.mark.parametrize("sizes", [[6], [1, 6], [2, 3], [3, 2], [3, 1, 2]])
def test_hierarchical_levels_split_a_group_by_strides(sizes: list[int]) -> None:
    ranks = [10, 3, 7, 4, 25, 6]
    for level, groups in enumerate(hierarchical_ranks(ranks, sizes)):
        stride = prod(sizes[:level])
        assert sorted(sum(groups, [])) == sorted(ranks)
        for group in groups:
            places = [ranks.index(rank) for rank in group]
            assert places == [places[0] + i * stride for i in range(sizes[level])]


def test_hierarchical_sizes_must_multiply_to_the_group() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] multiply to 6, not to 8"):
        hierarchical_ranks(list(range(8)), [2, 3])


def test_masks_choose_the_axes_of_a_grid() -> None:
    generator = RankGenerator(**DENSE_CP, order=DEFAULT_ORDER)
    for token in ("tp", "pp", "tp-pp", "dp-cp"):
        mask = generator.get_mask(generator.order, token)
        sizes = [DENSE_CP[axis] for axis in generator.order.split("-")]
        assert generate_masked_orthogonal_rank_groups(16, sizes, mask) == generator.get_ranks(token)
    with pytest.raises(ValueError, match=r"\[2, 4\] multiply to 8, not to 16"):
        generate_masked_orthogonal_rank_groups(16, [2, 4], [True, False])


def plan(*, tp: int, cp: int, pp: int, etp: int, ep: int, instances: int = 1) -> dict[str, list[list[int]]]:
    """All groups of 16 ranks."""
    dense = dense_layout(16, tp, pp, cp, DEFAULT_ORDER)
    experts = expert_layout(16, etp, ep, pp, DEFAULT_ORDER)
    return group_plan(dense, experts, instances, default_embedding_ranks, default_position_embedding_ranks)


def test_plan_of_16_ranks() -> None:
    groups = plan(tp=2, cp=2, pp=2, etp=1, ep=4)
    tabled = {
        "cp": STRIDE_2,
        "dp": STRIDE_4,
        "pp": STRIDE_8,
        "dp_cp": [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],
        "mp": [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]],
        "tp_cp": QUADS,
        "tp_dp_cp": [list(range(8)), list(range(8, 16))],
        "ep": QUADS,
        "expt_dp": STRIDE_4,
        "tp_ep_pp": [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]],
        "embd": STRIDE_8,
        "pos_embd": [[rank] for rank in range(8)],
    }
    assert {name: groups[name] for name in tabled} == tabled


def test_groups_are_created_in_the_order_of_the_table() -> None:
    """Ranks that create communicators in different orders wait for each other."""
    dense = ["dp_cp", "intra_dp_cp", "dp", "cp", "mp", "tp", "pp", "embd", "pos_embd", "tp_dp_cp", "tp_dp", "tp_cp"]
    experts = ["ep", "expt_tp", "tp_ep", "tp_ep_pp", "expt_dp", "intra_expt_dp", "inter_dist_opt", "intra_dist_opt"]
    assert list(plan(tp=2, cp=1, pp=4, etp=2, ep=1)) == dense + experts


@pytest.mark.parametrize("instances", [1, 2, 4])
def test_optimizer_instances_cut_replicas_into_consecutive_parts(instances: int) -> None:
    groups = plan(tp=2, cp=1, pp=1, etp=2, ep=2, instances=instances)
    size = 8 // instances
    halves = [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert groups["intra_dp_cp"] == [half[i : i + size] for half in halves for i in range(0, 8, size)]
    for replicas in groups["expt_dp"]:
        inside = [g for g in groups["intra_expt_dp"] if g[0] in replicas]
        across = [g for g in groups["inter_dist_opt"] if g[0] in replicas]
        assert sum(inside, []) == replicas
        assert across == [list(column) for column in zip(*inside)]
    # an instance is everything that holds one copy of the sharded state, experts of all ranks included
    assert groups["intra_dist_opt"] == [list(range(i, i + 16 // instances)) for i in range(0, 16, 16 // instances)]


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "etp", "ep"), [(2, 1, 4, 2, 1), (2, 2, 2, 1, 4), (1, 1, 1, 2, 8), (4, 2, 2, 1, 8)]
)
def test_every_rank_has_one_group_of_each_kind(tp: int, cp: int, pp: int, etp: int, ep: int) -> None:
    groups = plan(tp=tp, cp=cp, pp=pp, etp=etp, ep=ep)
    for name in groups:
        members = sorted(sum(groups[name], []))
        if name == "embd":
            assert members == sorted({rank for stages in groups["pp"] for rank in (stages[0], stages[-1])})
        elif name == "pos_embd":
            assert members == list(range(16 // pp))
        else:
            assert members == list(range(16)), name
