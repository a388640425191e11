"""A learned number for each head and distance between two tokens, added to attention scores (T5, arXiv:1910.10683,
section 2.1).

a heads, q queries, k keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.tensor_parallel.initialization import register_parameter_init
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide, get_pg_size, make_tp_sharded_tensor_for_checkpoint


def bucket_of_distance(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance key - query, int64 of the same shape.

    Small distances have a bucket each, as many as half of the buckets; larger ones share buckets whose borders grow
    by a constant factor, and all from `max_distance` on are in the last. Bidirectional: half of all buckets are for
    keys before the query, half for those after it. Otherwise all keys after the query count as distance 0.

    >>> bucket_of_distance(torch.tensor([1, 0, -3, -8, -200]), False, 8, 32).tolist()
    [0, 0, 3, 5, 7]
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
    steps = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = num_buckets // 2
    # fp32, in this order: the field's implementations round borders this way.
    growth = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(steps < exact, steps, coarse)


class RelativePositionEmbedding(nn.Module):
    """One table for all layers of a stack; its columns, the heads, are sharded over the tensor parallel ranks.

    (q, k) -> [1, a/tp, q, k]. No communication.

    Args:
        bidirectional: tell keys after the query apart.
        init_method: fills the table.
        relative_attention_num_buckets: distances that are told apart.
        relative_attention_max_distance: distance from which on all are alike.
        config: type of the parameters, and whether they are filled at all.
        tp_group: ranks that share the heads.

    Raises:
        ValueError: the buckets do not suffice to tell distances apart.
    """

    def __init__(
        self,
        bidirectional: bool,
        init_method: Callable[[Tensor], object],
        num_attention_heads: int,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        *,
        config: TransformerConfig | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        exact = relative_attention_num_buckets // (4 if bidirectional else 2)
        if exact < 1 or relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_num_buckets ({relative_attention_num_buckets}) must be at least "
                f"{4 if bidirectional else 2}, and relative_attention_max_distance "
                f"({relative_attention_max_distance}) larger than the {exact} distances with a bucket each"
            )
        self.bidirectional = bidirectional
        self.num_buckets, self.max_distance = relative_attention_num_buckets, relative_attention_max_distance
        self.tp_group = default_process_groups().tp if tp_group is None and has_default_process_groups() else tp_group
        heads = divide(num_attention_heads, get_pg_size(self.tp_group))
        self.relative_attention_bias = nn.Embedding.from_pretrained(
            torch.empty(
                self.num_buckets,
                heads,
                dtype=config.params_dtype if config is not None else None,
                device=device.current_device(),
            ),
            freeze=False,
        )
        set_tensor_model_parallel_attributes(self.relative_attention_bias.weight, True, 1, 1)
        register_parameter_init(
            self.relative_attention_bias.weight,
            init_method,
            partition_dim=1,
            tp_group=self.tp_group,
            perform_initialization=config is None or config.perform_initialization,
        )
        self._buckets: dict[tuple[int, int], Tensor] = {}

    def forward(self, query_seq_length: int, key_seq_length: int) -> Tensor:
        """What is added to the scores of this rank's heads, [1, a/tp, q, k]."""
        key = (query_seq_length, key_seq_length)
        if key not in self._buckets:
            where = self.relative_attention_bias.weight.device
            keys, queries = torch.arange(key_seq_length, device=where), torch.arange(query_seq_length, device=where)
            distance = keys[None] - queries[:, None]
            self._buckets[key] = bucket_of_distance(distance, self.bidirectional, self.num_buckets, self.max_distance)
        return self.relative_attention_bias(self._buckets[key]).permute(2, 0, 1).unsqueeze(0)

    def at(self, positions: Tensor, key_seq_length: int) -> Tensor:
        """[b, a/tp, 1, k] for one query at each of `positions` [b], and keys 0, 1, ..."""
        keys = torch.arange(key_seq_length, device=positions.device)
        distance = keys[None] - positions[:, None]
        buckets = bucket_of_distance(distance, self.bidirectional, self.num_buckets, self.max_distance)
        return self.relative_attention_bias(buckets).transpose(1, 2).unsqueeze(2)

    @staticmethod
    def get_relative_seq_len(
        inference_context: Any,
        transformer: nn.Module,
        transformer_input: Tensor | None,
        transformer_config: TransformerConfig,
        *,
        inference_params: Any = None,
    ) -> int:
        """Length of the whole sequence, whatever part of it this rank holds."""
        received = getattr(transformer, "input_tensor", None)
        tensor = transformer_input if received is None else received
        assert isinstance(tensor, Tensor)
        return tensor.size(0) * (
            transformer_config.tensor_model_parallel_size if transformer_config.sequence_parallel else 1
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The table, cut along the heads."""
        key = f"{prefix}relative_attention_bias.weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                self.relative_attention_bias.weight,
                key,
                1,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
            )
        }
