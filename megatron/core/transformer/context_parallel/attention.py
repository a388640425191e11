"""Attention over sequences that are cut over the context parallel ranks, by the core that attends whole ones.

s tokens of a whole sample, b microbatch, a heads, g query groups, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention_masks import effective_window
from megatron.core.transformer.context_parallel.gather import gathered_attention
from megatron.core.transformer.context_parallel.head_exchange import HeadExchange
from megatron.core.transformer.context_parallel.layout import SequenceLayout
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
        cp_comm_type: how keys and values come together. "p2p": around a ring; "all_gather": all at once; "a2a": all
            tokens of some heads on each rank, exchanged for some tokens of all heads; "a2a+p2p": heads within the
            inner level of ranks, a ring along the outer.
        groups: `cp`, and `hcp` (inner and outer level) for "a2a+p2p".

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
        self.core = core
        self.cp_comm_type = cp_comm_type
        self.group = groups.cp
        self.heads_group, self.keys_group = _groups_of(cp_comm_type, groups)
        self.attend_keys = gathered_attention if cp_comm_type == "all_gather" else ring_attention

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
        if mask_type is AttnMaskType.no_mask:
            attention_mask = None
        exchange = HeadExchange(layout, self._ranks_of_heads(), self.heads_group)
        query, key, value = exchange.to_heads(query, key, value)
        if attention_mask is not None:
            _require_whole_rows(attention_mask, layout.length)
            attention_mask = exchange.whole_mask(attention_mask)
        if get_pg_size(self.keys_group) == 1:
            context = self.core(query, key, value, attention_mask, mask_type, packed_seq_params=packed_seq_params)
        else:
            task = self._task(layout.over(get_pg_size(self.keys_group)), mask_type, attention_mask)
            context = self.attend_keys(query, key, value, task, self.keys_group).flatten(2)
        return exchange.to_tokens(context)

    def _ranks_of_heads(self) -> tuple[int, ...]:
        """The context parallel ranks that share heads, of which this is one."""
        size = get_pg_size(self.heads_group)
        first = get_pg_rank(self.group) // size * size
        return tuple(range(first, first + size))

    def _task(self, layout: SequenceLayout, mask_type: AttnMaskType, attention_mask: Tensor | None) -> AttentionTask:
        core = self.core
        if attention_mask is not None and mask_type is AttnMaskType.causal:
            mask_type = AttnMaskType.arbitrary  # such a mask says everything
        dropout_p, seed = core.dropout_p, 0
        if dropout_p > 0.0:
            with core.dropout_rng():
                seed = int(torch.randint(2**62, (), device=device.current_device()))
        return AttentionTask(
            layout=layout,
            rank=get_pg_rank(self.keys_group),
            window=effective_window(core.window_size, mask_type, layout.length, layout.length),
            scale=core.softmax_scale,
            hidden=attention_mask,
            may_fuse=not isinstance(core, DotProductAttention),
            dropout_p=dropout_p,
            dropout_seed=seed,
        )


def _groups_of(cp_comm_type: str, groups: ProcessGroupCollection) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """(ranks that exchange heads, ranks among which keys go round)."""
    match cp_comm_type:
        case "a2a":
            return groups.cp, None
        case "a2a+p2p":
            if groups.hcp is None or len(groups.hcp) != 2:
                raise ValueError("cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes of two levels")
            return groups.hcp
        case _:
            return None, groups.cp


def _require_whole_rows(attention_mask: Tensor, length: int) -> None:
    if attention_mask.size(-1) != length:
        raise ValueError(
            f"attention_mask has {attention_mask.size(-1)} columns; with context parallelism its rows are this rank's "
            f"queries and its columns all {length} keys (get_batch_on_this_cp_rank cuts it so)"
        )
