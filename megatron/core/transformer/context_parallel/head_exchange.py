"""All tokens of some heads for some tokens of all heads (DeepSpeed-Ulysses, arXiv:2309.14509).

n tokens of this rank, s' = n * ranks those of all ranks of the exchange, b microbatch, a heads, g query groups, d head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_into_tensor
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.context_parallel.layout import SequenceLayout
from megatron.core.transformer.context_parallel.token_order import inverse, order_of_tokens, reordered
from megatron.core.utils import divide, get_pg_rank, get_pg_size


@dataclass(frozen=True)
class HeadExchange:
    """One attention's exchanges over `group`, whose ranks hold the parts `ranks` of `layout`."""

    layout: SequenceLayout
    ranks: tuple[int, ...]
    group: ProcessGroup | None

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """[n, b, heads, d] each -> [s', b, heads/ranks, d], tokens in the order of the sample.

        All-to-all, all tensors in one message; backward is the inverse. Groups that do not divide over the ranks are
        repeated first.
        """
        size = get_pg_size(self.group)
        if size == 1:
            return list(tensors)
        most = max(x.size(2) for x in tensors)
        whole = [x.repeat_interleave(repeats(x.size(2), most, size), dim=2) for x in tensors]
        n, b = tensors[0].shape[:2]
        shares = [x.reshape(n, b, size, -1) for x in whole]  # a head's channels lie together
        message = torch.cat(shares, dim=-1).permute(2, 0, 1, 3).reshape(size * n, b, -1)
        received = self._in_order(all_to_all(self.group, message))
        parts = received.split([x.size(-1) for x in shares], dim=-1)
        return [part.unflatten(-1, (x.size(2) // size, x.size(3))) for part, x in zip(parts, whole)]

    def to_tokens(self, context: Tensor) -> Tensor:
        """[s', b, h/ranks] -> [n, b, h]: all-to-all; backward is the inverse."""
        size = get_pg_size(self.group)
        if size == 1:
            return context
        by_rank = reordered(context, inverse(self._order(context)))
        received = all_to_all(self.group, by_rank)
        n, b = divide(context.size(0), size), context.size(1)
        return received.view(size, n, b, -1).permute(1, 2, 0, 3).reshape(n, b, -1)

    def whole_mask(self, mask: Tensor) -> Tensor:
        """An attention mask [b or 1, a or 1, n or 1, s] with the rows of all ranks and the heads of this one: [b or 1,
        a/ranks or 1, s' or 1, s]. All-gathers."""
        size = get_pg_size(self.group)
        if size == 1:
            return mask
        if mask.size(2) > 1:
            mask = self._whole_rows(mask)
        return mask if mask.size(1) == 1 else mask.unflatten(1, (size, -1))[:, get_pg_rank(self.group)]

    def _whole_rows(self, mask: Tensor) -> Tensor:
        rows = mask.permute(2, 0, 1, 3).contiguous().view(torch.uint8)  # [n, b, a, s]
        gathered = rows.new_empty(get_pg_size(self.group) * rows.size(0), *rows.shape[1:])
        all_gather_into_tensor(gathered, rows, group=self.group, what="attention masks")
        return self._in_order(gathered).view(torch.bool).permute(1, 2, 0, 3)

    def _in_order(self, x: Tensor) -> Tensor:
        return reordered(x, self._order(x))

    def _order(self, x: Tensor) -> Tensor:
        return order_of_tokens(self.layout, self.ranks, x.device)


def repeats(heads: int, most: int, size: int) -> int:
    """How often to repeat each of `heads` heads, which `most` queries share evenly, so that they divide over `size`."""
    return next(r for r in range(1, most // heads + 1) if (most // heads) % r == 0 and heads * r % size == 0)
