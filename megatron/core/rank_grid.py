"""Which rank talks to which: pure arithmetic on the grid of ranks, usable without any process.

A layout is an order such as `tp-cp-ep-dp-pp` (the first axis varies fastest) and a size for each axis.
`rank = sum(index[axis] * stride[axis])` with `stride` the product of the faster axes' sizes.
"""

from __future__ import annotations

from math import prod

import numpy as np


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
        raise ValueError(
            f"hierarchical sizes {level_sizes} multiply to {prod(level_sizes)}, not to {len(ranks)}"
        )
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
