"""Cutting tensors and vocabularies into equal parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_into_tensor
from megatron.core.utils import divide, get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> list[Tensor]:
    """`num_partitions` equal parts of the last dimension; views unless contiguous ones are asked for."""
    parts = torch.split(tensor, divide(tensor.size(-1), num_partitions), dim=-1)
    return [part.contiguous() for part in parts] if contiguous_split_chunks else list(parts)


def split_tensor_into_1d_equal_chunks(
    tensor: Tensor, new_buffer: bool = False, tp_group: ProcessGroup | None = None
) -> Tensor:
    """This rank's 1/tp part of the flattened tensor; a copy if `new_buffer`."""
    group = get_tensor_model_parallel_group_if_none(tp_group)
    elements = divide(tensor.numel(), get_pg_size(group))
    part = tensor.contiguous().view(-1).split(elements)[get_pg_rank(group)]
    return part.clone() if new_buffer else part


def gather_split_1d_tensor(tensor: Tensor, tp_group: ProcessGroup | None = None) -> Tensor:
    """The flat tensor whose parts `split_tensor_into_1d_equal_chunks` gave to the ranks. Communicates: all-gather."""
    group = get_tensor_model_parallel_group_if_none(tp_group)
    gathered = tensor.new_empty(tensor.numel() * get_pg_size(group))
    if get_pg_size(group) == 1:
        return gathered.copy_(tensor)
    all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


class VocabUtility:
    """Rows `[first, last)` of the vocabulary that a tensor parallel rank holds."""

    @staticmethod
    def vocab_range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> Sequence[int]:
        """Range of `rank` given the rows of one rank."""
        return rank * per_partition_vocab_size, (rank + 1) * per_partition_vocab_size

    @staticmethod
    def vocab_range_from_global_vocab_size(global_vocab_size: int, rank: int, world_size: int) -> Sequence[int]:
        """Range of `rank` given the rows of all ranks."""
        rows = divide(global_vocab_size, world_size)
        return VocabUtility.vocab_range_from_per_partition_vocab_size(rows, rank, world_size)
