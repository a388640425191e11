"""Learning to retrieve: of all passages of the batch, on all data parallel ranks, a query's own is to score highest.

b microbatch, n = b x data parallel size, p projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import get_pg_rank, get_pg_size


def in_batch_scores(queries: Tensor, contexts: Tensor, group: ProcessGroup | None, *, scaled: bool = False) -> Tensor:
    """[b, n] fp32, with m contexts for each query [b, n m]: inner products of this rank's queries with the contexts of
    every rank of `group`.

    Each rank's loss is a function of all contexts: all-gather; backward reduce-scatters, so that the vectors of a
    rank's contexts get the gradients of every rank's loss.

    Args:
        queries: [b, p].
        contexts: [b, p], the i-th being the right one of the i-th query; or as many times more, those of a query one
            after the other, its right one first.
        scaled: divide by the square root of p.
    """
    if get_pg_size(group) > 1:
        contexts = gather_from_sequence_parallel_region(contexts.contiguous(), group=group)
    scores = queries.float() @ contexts.float().T
    return scores / queries.size(-1) ** 0.5 if scaled else scores


def in_batch_loss(scores: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(sum over this rank's queries of -log softmax of their own context, which column that is [b])."""
    num_queries, width = scores.size(0), scores.size(1) // get_pg_size(group)  # of one rank
    own = torch.arange(0, width, width // num_queries, device=scores.device) + get_pg_rank(group) * width
    return cross_entropy(scores, own, reduction="sum"), own


def hits_among_top(scores: Tensor, own: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """k -> how many queries have their own context among the k best; a context that scores as high comes first."""
    right = scores.gather(1, own[:, None])
    ahead = (scores >= right).sum(1) - 1
    return {k: (ahead < k).sum() for k in ks}
