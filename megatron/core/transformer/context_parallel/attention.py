"""Attention over sequences that are cut over the context parallel ranks, by the core that attends whole ones.

s tokens of a whole sample, b microbatch, a heads, g query groups, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention_masks import effective_window
from megatron.core.transformer.context_parallel.packed import sequence_layout
from megatron.core.transformer.context_parallel.ring import ring_attention
from megatron.core.transformer.context_parallel.task import AttentionTask
from megatron.core.transformer.context_parallel_rules import comm_type_of
from megatron.core.transformer.core_attention import CoreAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size


def attend_across_ranks(core: Any, cp_comm_type: str | None, groups: ProcessGroupCollection) -> Any:
    """`core`, or, where sequences are cut over several context parallel ranks, what attends across them.

    A core of another family than `CoreAttention` is left as it is: it is asked to communicate by itself.
    """
    if get_pg_size(groups.cp) == 1 or not isinstance(core, CoreAttention):
        return core
    return ContextParallelAttention(core, comm_type_of(cp_comm_type), groups)


class ContextParallelAttention(MegatronModule):
    """A core whose queries, keys and values are this rank's part of the sequence.

    query [s/cp, b, a/tp, d], key and value [s/cp, b, g/tp, d] -> [s/cp, b, a/tp * d].

    Args:
        core: says scale, window, dropout and mask type, and attends where a rank has all tokens of some heads.
        cp_comm_type: how keys and values come together; "p2p" sends them around a ring.
        groups: `cp`.

    Raises:
        NotImplementedError: cross attention.
    """

    def __init__(self, core: CoreAttention, cp_comm_type: str, groups: ProcessGroupCollection) -> None:
        super().__init__(core.config)
        if core.attention_type != "self":
            raise NotImplementedError(
                f"{core.attention_type} attention with context_parallel_size {get_pg_size(groups.cp)}: "
                "use context_parallel_size 1"
            )
        if cp_comm_type != "p2p":
            raise NotImplementedError(f"cp_comm_type {cp_comm_type!r} is not built yet: use 'p2p'")
        self.core = core
        self.cp_comm_type = cp_comm_type
        self.group = groups.cp

    @torch.compiler.disable  # collectives in an order that a graph must not change
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Context [s/cp, b, a/tp * d]; arguments as of `CoreAttention.forward`, except:

        Args:
            attention_mask: rows are this rank's queries, columns all keys in the order of the sample: broadcasts to
                [b, a, s/cp, s].
            packed_seq_params: borders in whole samples, the same on all ranks.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention_bias with context parallelism is not built yet")
        size = get_pg_size(self.group)
        layout = sequence_layout(packed_seq_params, query.size(0) * size, query.size(1), size)
        mask_type = attn_mask_type or self.core.attn_mask_type
        task = self._task(layout, mask_type, attention_mask)
        return ring_attention(query, key, value, task, self.group).flatten(2)

    def _task(self, layout: Any, mask_type: AttnMaskType, attention_mask: Tensor | None) -> AttentionTask:
        core = self.core
        if mask_type is AttnMaskType.no_mask:
            attention_mask = None
        if attention_mask is not None:
            _require_whole_rows(attention_mask, layout.length)
            if mask_type is AttnMaskType.causal:  # such a mask says everything
                mask_type = AttnMaskType.arbitrary
        dropout_p, seed = core.dropout_p, 0
        if dropout_p > 0.0:
            with core.dropout_rng():
                seed = int(torch.randint(2**62, (), device=device.current_device()))
        return AttentionTask(
            layout=layout,
            rank=get_pg_rank(self.group),
            window=effective_window(core.window_size, mask_type, layout.length, layout.length),
            scale=core.softmax_scale,
            hidden=attention_mask,
            may_fuse=not isinstance(core, DotProductAttention),
            dropout_p=dropout_p,
            dropout_seed=seed,
        )


def _require_whole_rows(attention_mask: Tensor, length: int) -> None:
    if attention_mask.size(-1) != length:
        raise ValueError(
            f"attention_mask has {attention_mask.size(-1)} columns; with context parallelism its rows are this rank's "
            f"queries and its columns all {length} keys (get_batch_on_this_cp_rank cuts it so)"
        )
