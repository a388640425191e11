"""A mixer's heads shared among context parallel ranks: each has the whole sequence of some of them.

n tokens of this rank, s' = n x ranks those of all, b microbatch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.ssm.mamba_sizes import MambaSizes
from megatron.core.transformer.context_parallel.head_exchange import HeadExchange, repeats
from megatron.core.transformer.context_parallel.layout import uniform_layout
from megatron.core.utils import get_pg_rank, get_pg_size


class HeadsOfRank:
    """What one of the ranks of `group` computes of a mixer, and how it gets it: an all-to-all before and one after.

    Where there are fewer groups than ranks, ranks that share a group have copies of its B and C.

    Args:
        sizes: what all of them have together, the share of a tensor parallel rank.
    """

    def __init__(self, sizes: MambaSizes, group: ProcessGroup | None) -> None:
        self.group, self.size, self.rank = group, get_pg_size(group), get_pg_rank(group)
        self.all = sizes
        self.copies = repeats(sizes.groups, sizes.heads, self.size)
        self.sizes = replace(
            sizes,
            inner=sizes.inner // self.size,
            heads=sizes.heads // self.size,
            groups=sizes.groups * self.copies // self.size,
        )
        """What this rank computes."""

    def to_heads(self, xbc: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """x, B, C [n, b, channels] and dt [n, b, heads] -> [s', b, ...] of this rank's heads, in the order of the
        sample. All-to-all; backward is the inverse."""
        if self.size == 1:
            return xbc, dt
        x, B, C = xbc.split(self.all.parts_of_conv, dim=-1)
        heads, groups = (self.all.heads, -1), (self.all.groups, -1)
        parts = (x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups), dt.unsqueeze(-1))
        x, B, C, dt = (part.flatten(2) for part in self._exchange(xbc.size(0)).to_heads(*parts))
        return torch.cat((x, B, C), dim=-1), dt

    def to_tokens(self, y: Tensor) -> Tensor:
        """[s', b, channels of this rank's heads] -> [n, b, channels of all heads]: all-to-all; backward is the
        inverse."""
        return y if self.size == 1 else self._exchange(y.size(0) // self.size).to_tokens(y)

    def of_heads(self, param: Tensor) -> Tensor:
        """This rank's part of a parameter that has as much for each head."""
        return param if self.size == 1 else param.chunk(self.size)[self.rank]

    def of_channels(self, param: Tensor | None) -> Tensor | None:
        """This rank's part of a parameter of the convolution."""
        if self.size == 1 or param is None:
            return param
        x, B, C = param.split(self.all.parts_of_conv)
        by_group = (part.unflatten(0, (self.all.groups, -1)).repeat_interleave(self.copies, 0) for part in (B, C))
        return torch.cat([self.of_heads(x), *(self.of_heads(part).flatten(0, 1) for part in by_group)])

    def _exchange(self, tokens: int) -> HeadExchange:
        layout = uniform_layout(tokens * self.size, self.size)
        return HeadExchange(layout, tuple(range(self.size)), self.group)
