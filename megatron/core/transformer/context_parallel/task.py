"""What a rank's queries see, as blocks with the kernel for each.

n queries, m keys of one rank, b microbatch, a heads, g query groups, d head width, s tokens of a whole sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.core.tensor_parallel.rng_tracker import mixed_seed
from megatron.core.transformer.context_parallel.block_kernels import (
    BlockKernel,
    WrittenOutKernel,
    accumulation_type,
    fused_kernel,
    merge,
)
from megatron.core.transformer.context_parallel.layout import (
    Block,
    Order,
    SequenceLayout,
    Window,
    blocks,
    positions,
)

Step = tuple[slice, Block, BlockKernel]


@dataclass(frozen=True)
class AttentionTask:
    """Attention of this rank's queries: everything but the tensors."""

    layout: SequenceLayout
    rank: int
    """Which part of `layout` the queries are."""
    window: Window
    """What a query sees by the order of tokens; an explicit mask hides more."""
    scale: float
    hidden: Tensor | None = None
    """[b or 1, a or 1, n or 1, s] bool, True where a key is hidden; keys by their position in the sample."""
    may_fuse: bool = True
    """Whether torch's fused kernels may be used."""
    dropout_p: float = 0.0
    dropout_seed: int = 0
    """Different on every rank."""
    _columns: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_rank: int | None, out: Tensor, lse: Tensor) -> list[Any]:
        """Add attention to the keys of `key_rank` to `out` and `lse`, in place; what `backward` needs.

        Args:
            q: [n, b, a, d].
            k: [m, b, g, d], offsets as `key_rank` holds them; None: the whole sample.
            v: like `k`.
            out: [n, b, a, d] of accumulation type, 0 before the first keys.
            lse: [b, a, n] of accumulation type, -inf before the first keys.
        """
        saved = []
        queries, keys, values, totals = (_by_head(x) for x in (q, k, v, out))
        for rows, block, kernel in self._steps(q, key_rank):
            mine, theirs = slice(*block.queries), slice(*block.keys)
            block_out, block_lse, extra = kernel.forward(
                queries[rows, :, mine], keys[rows, :, theirs], values[rows, :, theirs]
            )
            merge(totals[rows, :, mine], lse[rows, :, mine], block_out, block_lse)
            saved.append(extra)
        return saved

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_rank: int | None,
        out: Tensor,
        lse: Tensor,
        saved: list[Any],
        dq: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(dk, dv) of the keys of `key_rank`, of accumulation type; adds to `dq` in place.

        `out` and `lse` are of all keys; `saved` is what `forward` returned for these.
        """
        dk, dv = (torch.zeros(x.shape, dtype=accumulation_type(x.dtype), device=x.device) for x in (k, v))
        queries, keys, values, results, grads = (_by_head(x) for x in (q, k, v, out, grad))
        q_grads, k_grads, v_grads = _by_head(dq), _by_head(dk), _by_head(dv)
        for (rows, block, kernel), extra in zip(self._steps(q, key_rank), saved):
            mine, theirs = slice(*block.queries), slice(*block.keys)
            block_dq, block_dk, block_dv = kernel.backward(
                grads[rows, :, mine],
                queries[rows, :, mine],
                keys[rows, :, theirs],
                values[rows, :, theirs],
                results[rows, :, mine],
                lse[rows, :, mine],
                extra,
            )
            q_grads[rows, :, mine] += block_dq
            k_grads[rows, :, theirs] += block_dk
            v_grads[rows, :, theirs] += block_dv
        return dk, dv

    def _steps(self, q: Tensor, key_rank: int | None) -> Iterator[Step]:
        """The blocks with the keys of `key_rank`, in the same order every time."""
        number = 0
        for row in range(self.layout.num_rows):
            rows = slice(None) if self.layout.num_rows == 1 else slice(row, row + 1)
            for block in blocks(self.layout.row(row), self.rank, key_rank, self.window):
                number += 1
                yield rows, block, self._kernel(q, rows, row, block, key_rank, number)

    def _kernel(self, q: Tensor, rows: slice, row: int, block: Block, key_rank: int | None, number: int) -> BlockKernel:
        plain = self.hidden is None and self.dropout_p == 0.0 and block.order is not Order.BAND
        if plain and self.may_fuse:
            fused = fused_kernel(q, self.scale, block.order is Order.CAUSAL)
            if fused is not None:
                return fused
        hidden = None if self.hidden is None else self._hidden_in(rows, row, block, key_rank)
        seed = mixed_seed(self.dropout_seed, -1 if key_rank is None else key_rank, number)
        return WrittenOutKernel(self.scale, block, self.window, hidden, self.dropout_p, seed)

    def _hidden_in(self, rows: slice, row: int, block: Block, key_rank: int | None) -> Tensor:
        """[b or 1, a or 1, n or 1, m], the mask of one block."""
        assert self.hidden is not None
        mask = self.hidden if self.hidden.size(0) == 1 else self.hidden[rows]
        if mask.size(2) > 1:
            mask = mask[:, :, slice(*block.queries)]
        if key_rank is None:
            return mask[..., slice(*block.keys)]
        if (row, key_rank) not in self._columns:
            places = positions(self.layout.row(row), key_rank)
            self._columns[row, key_rank] = torch.tensor(places, device=mask.device)
        return mask.index_select(-1, self._columns[row, key_rank][slice(*block.keys)])


def _by_head(x: Tensor) -> Tensor:
    """[n, b, a, d] seen as [b, a, n, d]."""
    return x.permute(1, 2, 0, 3)
