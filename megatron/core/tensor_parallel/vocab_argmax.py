"""The most likely token where the vocabulary is sharded over the tensor parallel group. v vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_reduce
from megatron.core.utils import get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none


def vocab_parallel_argmax(
    logits: Tensor, tp_group: ProcessGroup | None = None, vocab_size: int | None = None
) -> Tensor:
    """[...] int64: the token with the highest of the logits [..., v/tp], the first of equals; the same on every rank.

    Communicates: two all-reduces of a number for each row over the tensor parallel group.

    Args:
        vocab_size: of the vocabulary without padding; a padding column is never chosen.
    """
    group = get_tensor_model_parallel_group_if_none(tp_group)
    width, size = logits.size(-1), get_pg_size(group)
    first = get_pg_rank(group) * width
    valid = width if vocab_size is None else min(max(vocab_size - first, 0), width)
    if size == 1:
        return logits[..., :valid].argmax(-1)
    shape = logits.shape[:-1]
    if valid:
        best, where = logits[..., :valid].float().max(-1)
    else:  # nothing but padding here
        best, where = torch.full(shape, -torch.inf, device=logits.device), torch.zeros(shape, device=logits.device)
    highest = best.clone()
    all_reduce(highest, dist.ReduceOp.MAX, group=group, what="largest logits")
    token = torch.where(best == highest, where.long() + first, size * width)
    all_reduce(token, dist.ReduceOp.MIN, group=group, what="most likely tokens")
    return token
