"""Planted mistakes in experts, latent attention and further tokens; see `mutations`."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_size
from tests.functional_tests.equivalence.mutations import Mutation, nothing

CORE = "megatron.core"
MOE = f"{CORE}.transformer.moe"
ON_TWO = {"dp": "2", "ep": "2"}


def one_rank_later(right: Any) -> Any:
    """Rows come back from the wrong place: rolled by one."""
    return lambda rows, source, num_tokens: right(rows, source.roll(1), num_tokens)


def with_probabilities_of_others(right: Any) -> Any:
    """Each row has the weight of its neighbour."""
    return lambda rows, weights, config: right(rows, weights.roll(1), config)


def bias_of_own_tokens(right: Any) -> Any:
    """The bias follows the load of this rank's tokens alone."""
    return lambda routers, groups: right(routers, ProcessGroupCollection(tp_dp_cp=None))


MUTATIONS = [
    Mutation(
        "the balancing loss counts this rank's tokens only",
        f"{MOE}.router:TopKRouter._of_all_ranks",
        lambda right: lambda self, counts: counts,
        {"tp": "2", "balancing": "aux_loss"},
        "gradients",
    ),
    Mutation(
        "the balancing loss of a sequence counts this rank's part only",
        f"{MOE}.router:TopKRouter._of_all_ranks",
        lambda right: lambda self, counts: counts,
        {"cp": "2", "balancing": "seq_aux_loss"},
        "gradients",
    ),
    Mutation(
        "the balancing loss of the batch counts one replica",
        f"{MOE}.router:all_reduce",
        nothing,
        {"dp": "2", "balancing": "of the batch"},
        "gradients",
    ),
    Mutation(
        "the balancing loss of the batch remembers the step before",
        f"{MOE}.router:TopKRouter.begin_batch",
        lambda right: lambda self: None,
        {"dp": "2", "balancing": "of the batch"},
        "loss",
    ),
    Mutation(
        "the routers' losses are not averaged over micro-batches",
        f"{MOE}.aux_loss:MoEAuxLossAutoScaler.set_loss_scale",
        lambda right: lambda scale: right(1.0),
        {"dp": "2"},
        "gradients",
    ),
    Mutation(
        "the z-loss is a mean over this rank's tokens",
        f"{MOE}.router:router_z_loss",
        lambda right: lambda logits, total: right(logits, len(logits)),
        {"tp": "2"},
        "gradients",
    ),
    Mutation(
        "the bias of experts follows the load of one rank",
        f"{CORE}.distributed.finalize_model_grads:update_expert_bias",
        bias_of_own_tokens,
        {"dp": "2", "balancing": "bias"},
        "loss",
    ),
    Mutation(
        "results go back to other tokens",
        f"{MOE}.token_dispatcher:unpermute",
        one_rank_later,
        ON_TWO,
        "loss",
    ),
    Mutation(
        "results are weighted with the probabilities of others",
        f"{MOE}.experts:_weighted_input",
        with_probabilities_of_others,
        ON_TWO,
        "loss",
    ),
    Mutation(
        "rows from several ranks are not sorted by expert",
        f"{MOE}.token_dispatcher:sort_chunks_by_idxs",
        lambda right: lambda rows, sizes, order, probs=None, fused=False: (rows, probs),
        {"dp": "2", "ep": "2", "dispatcher": "alltoall"},
        "loss",
    ),
    Mutation(
        "a token gets the gradient of one rank's experts",
        f"{MOE}.token_dispatcher:gather_from_sequence_parallel_region",
        lambda right: (
            lambda x, group=None, output_split_sizes=None: right(
                x, False, group=group, output_split_sizes=output_split_sizes
            )
        ),
        {"dp": "2", "ep": "2", "dispatcher": "allgather"},
        "gradients",
    ),
    Mutation(
        "experts' gradients are averaged over their replicas only",
        f"{CORE}.distributed.distributed_data_parallel:DistributedDataParallel._gradient_scaling_factor",
        lambda right: lambda self, group: 1.0 / get_pg_size(group),
        ON_TWO,
        "gradients",
    ),
    Mutation(
        "experts count as replicas of data parallel ranks",
        f"{CORE}.distributed.distributed_data_parallel:is_expert_parallel",
        lambda right: lambda param: False,
        ON_TWO,
        "gradients",
    ),
    Mutation(
        "parts of an expert are not summed",
        f"{MOE}.token_dispatcher:reduce_scatter_to_sequence_parallel_region",
        lambda right: lambda x, group=None, sizes=None: right(x, group, sizes) * 0.5,
        {"tp": "2", "etp": "2"},
        "loss",
    ),
    Mutation(
        "the key that heads share gets the gradient of one rank's heads",
        f"{CORE}.transformer.multi_latent_attention:gather_from_sequence_parallel_region",
        lambda right: lambda x, group=None: right(x, False, group=group),
        {"tp": "2", "attention": "latent"},
        "gradients",
    ),
    Mutation(
        "latents of other ranks' tokens are taken for this rank's",
        f"{CORE}.transformer.multi_latent_attention:gather_features",
        lambda right: lambda x, sequence_parallel, group=None: right(x, sequence_parallel, group).roll(1, 0),
        {"tp": "2", "attention": "latent"},
        "loss",
    ),
    Mutation(
        "further tokens end where a rank's part of the sequence ends",
        f"{CORE}.transformer.multi_token_prediction:of_next_tokens",
        lambda right: lambda x, ends=None, cp_group=None: right(x, ends, None),
        {"cp": "2", "further tokens": "2"},
        "gradients",
    ),
    Mutation(
        "each context parallel rank divides further tokens' losses by its own tokens",
        f"{CORE}.transformer.multi_token_prediction:all_reduce",
        nothing,
        {"cp": "2", "further tokens": "2"},
        "gradients",
    ),
    Mutation(
        "the embeddings of both ends go their own ways",
        f"{CORE}.distributed.finalize_model_grads:_shared_word_embedding",
        lambda right: lambda chunk: None,
        {"pp": "2", "further tokens": "2", "output": "untied"},
        "copies on several ranks",
    ),
]

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
