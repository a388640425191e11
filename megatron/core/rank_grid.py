"""Which rank talks to which: pure arithmetic on the grid of ranks, usable without any process.

A layout is an order such as `tp-cp-ep-dp-pp` (the first axis varies fastest) and a size for each axis.
`rank = sum(index[axis] * stride[axis])` with `stride` the product of the faster axes' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import numpy as np

from megatron.core.stage_placement import PlacementShape

RankGroups = list[list[int]]


def ranks_along(axes: str, sizes: dict[str, int], offset: int = 0) -> list[list[int]]:
    """Groups of ranks that communicate along `axes` (joined by `-`); the first axis of `sizes` varies fastest.

    Inside a group, and from group to group, ranks are enumerated in the order of `sizes`.

    >>> ranks_along("dp", {"tp": 2, "dp": 2})
    [[0, 2], [1, 3]]
    >>> ranks_along("tp-pp", {"tp": 2, "dp": 2, "pp": 2})
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    chosen = axes.split("-")
    unknown = [axis for axis in chosen if axis not in sizes]
    if unknown:
        raise ValueError(f"unknown axes {unknown}; the layout has {list(sizes)}")
    names = list(sizes)[::-1]  # slowest first, as numpy strides
    grid = np.arange(prod(sizes.values())).reshape([sizes[name] for name in names]) + offset
    inside = [i for i, name in enumerate(names) if name in chosen]
    outside = [i for i, name in enumerate(names) if name not in chosen]
    return grid.transpose(outside + inside).reshape(-1, prod(sizes[axis] for axis in chosen)).tolist()


def hierarchical_ranks(ranks: list[int], level_sizes: list[int]) -> list[list[list[int]]]:
    """Groups of each level of a hierarchy over `ranks`; the first level varies fastest.

    >>> hierarchical_ranks([0, 1, 2, 3], [2, 2])
    [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    """
    if prod(level_sizes) != len(ranks):
        raise ValueError(f"hierarchical sizes {level_sizes} multiply to {prod(level_sizes)}, not to {len(ranks)}")
    sizes = {str(level): size for level, size in enumerate(level_sizes)}
    return [[[ranks[i] for i in group] for group in ranks_along(level, sizes)] for level in sizes]


class RankGenerator:
    """The layout of `tp * ep * dp * pp * cp` ranks in a given order.

    Args:
        order: axes joined by `-`, fastest first; every axis larger than 1 must be named.
        rank_offset: number of the first rank.
    """

    def __init__(self, tp: int, ep: int, dp: int, pp: int, cp: int, order: str, rank_offset: int = 0) -> None:
        given = {"tp": tp, "ep": ep, "dp": dp, "pp": pp, "cp": cp}
        axes = order.lower().split("-")
        for axis, size in given.items():
            if axis not in axes and size != 1:
                raise ValueError(f"the rank order {order!r} does not name {axis}, whose size is {size}")
        self.sizes = {axis: given[axis] for axis in axes} | {a: 1 for a in given if a not in axes}
        self.order = "-".join(self.sizes)
        self.rank_offset = rank_offset
        self.world_size = prod(given.values())

    def get_mask(self, order: str, token: str) -> list[bool]:
        """For each axis of `order`, whether `token` names it."""
        return [axis in token.split("-") for axis in order.split("-")]

    def get_ranks(self, token: str) -> list[list[int]]:
        """All groups along the axes of `token`, e.g. `"tp-pp"`."""
        return ranks_along(token, self.sizes, self.rank_offset)


def generate_masked_orthogonal_rank_groups(
    world_size: int, parallel_size: list[int], mask: list[bool]
) -> list[list[int]]:
    """Groups along the masked axes of a grid of `parallel_size`, first axis fastest."""
    if prod(parallel_size) != world_size:
        raise ValueError(f"sizes {parallel_size} multiply to {prod(parallel_size)}, not to {world_size}")
    sizes = {str(i): size for i, size in enumerate(parallel_size)}
    return ranks_along("-".join(str(i) for i, chosen in enumerate(mask) if chosen), sizes)


# --- all groups of a layout ------------------------------------------------------------------------------------


def default_embedding_ranks(
    pp_ranks: list[int], split_rank: int | None = None, shape: PlacementShape = "loop"
) -> list[int]:
    """Ranks of one pipeline that hold the word embedding: the first stage and, tied, the last; in a V, one holds
    both. Behind an encoder of `split_rank` stages the decoder's first stage holds it too."""
    if len(pp_ranks) == 1 or shape == "v":
        return [pp_ranks[0]]
    return list(dict.fromkeys([pp_ranks[0], pp_ranks[split_rank or 0], pp_ranks[-1]]))


def default_position_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Ranks of one pipeline that hold position embeddings: the first stage, and the first of a decoder behind an
    encoder of `split_rank` stages."""
    return list(dict.fromkeys([pp_ranks[0], pp_ranks[split_rank or 0]]))


def dense_layout(world_size: int, tp: int, pp: int, cp: int, order: str) -> RankGenerator:
    """The grid of everything but experts; data parallelism takes the ranks that are left.

    Raises:
        RuntimeError: the sizes do not fit the world.
    """
    if world_size % (tp * pp * cp):
        raise RuntimeError(
            f"world size {world_size} is not a multiple of tensor {tp} × pipeline {pp} × context {cp} = {tp * pp * cp}"
        )
    return RankGenerator(tp=tp, ep=1, dp=world_size // (tp * pp * cp), pp=pp, cp=cp, order=order)


def expert_layout(world_size: int, etp: int, ep: int, pp: int, order: str) -> RankGenerator:
    """The grid of the experts over the same ranks.

    Raises:
        RuntimeError: the sizes do not fit the world.
    """
    if world_size % (etp * ep * pp):
        raise RuntimeError(
            f"world size {world_size} is not a multiple of expert tensor {etp} × expert {ep} × pipeline {pp}"
        )
    return RankGenerator(tp=etp, ep=ep, dp=world_size // (etp * ep * pp), pp=pp, cp=1, order=order)


def group_plan(
    dense: RankGenerator,
    expert: RankGenerator,
    num_instances: int,
    embedding_ranks: Callable[[list[int], int | None], list[int]],
    position_embedding_ranks: Callable[[list[int], int | None], list[int]],
    split_rank: int | None = None,
) -> dict[str, RankGroups]:
    """All groups by field name of `ProcessGroupCollection`, in creation order."""
    pipelines = dense.get_ranks("pp")
    data, expert_data = dense.get_ranks("dp-cp"), expert.get_ranks("dp")
    for name, size in (("data", len(data[0])), ("expert data", len(expert_data[0]))):
        if size % num_instances:
            raise RuntimeError(f"num_distributed_optimizer_instances ({num_instances}) must divide {name} size {size}")
    intra, inter = _instances(expert_data, num_instances)
    model_groups = expert.get_ranks("tp-ep-pp")
    per_instance = len(model_groups) // num_instances
    return {
        "dp_cp": data,
        "intra_dp_cp": [part for group in data for part in _slices(group, num_instances)],
        "dp": dense.get_ranks("dp"),
        "cp": dense.get_ranks("cp"),
        "mp": dense.get_ranks("tp-pp"),
        "tp": dense.get_ranks("tp"),
        "pp": pipelines,
        "embd": [embedding_ranks(ranks, split_rank) for ranks in pipelines],
        "pos_embd": [position_embedding_ranks(ranks, split_rank) for ranks in pipelines],
        "tp_dp_cp": dense.get_ranks("tp-dp-cp"),
        "tp_dp": dense.get_ranks("tp-dp"),
        "tp_cp": dense.get_ranks("tp-cp"),
        "ep": expert.get_ranks("ep"),
        "expt_tp": expert.get_ranks("tp"),
        "tp_ep": expert.get_ranks("tp-ep"),
        "tp_ep_pp": model_groups,
        "expt_dp": expert_data,
        "intra_expt_dp": intra,
        "inter_dist_opt": inter,
        "intra_dist_opt": [
            sorted(sum(model_groups[i : i + per_instance], []))
            for i in range(0, len(model_groups), max(per_instance, 1))
        ],
    }


def _slices(ranks: list[int], count: int) -> RankGroups:
    size = len(ranks) // count
    return [ranks[i : i + size] for i in range(0, len(ranks), size)]


def _instances(groups: RankGroups, count: int) -> tuple[RankGroups, RankGroups]:
    """Each group cut into `count` instances (consecutive ranks), and the ranks at the same place of every instance."""
    levels = [hierarchical_ranks(group, [len(group) // count, count]) for group in groups]
    return sum((level[0] for level in levels), []), sum((level[1] for level in levels), [])


def hierarchical_plan(layout: RankGenerator, sizes: list[int]) -> Iterator[RankGroups]:
    """Groups of each level of hierarchical context parallelism."""
    levels = [hierarchical_ranks(ranks, sizes) for ranks in layout.get_ranks("cp")]
    for level in range(len(sizes)):
        yield sum((groups[level] for groups in levels), [])
