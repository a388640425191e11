"""How tokens travel to the ranks that hold their experts, and the results back.

Experts are cut over the expert parallel group (EP), each of them over the expert tensor parallel group (ETP); `tp_ep`
is the product of both, ETP first. A rank has n tokens; E experts, E/EP of them here. Every dispatcher gives the experts
their rows in the order of experts, in each by the rank and the place that they come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.collectives import all_gather_into_tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.exchange import exchange_during
from megatron.core.transformer.moe.permutation import permute, sort_chunks_by_idxs, unpermute
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import get_pg_rank, get_pg_size


class MoETokenDispatcher(ABC):
    """The steps from a rank's tokens to its experts' rows and back; each pair of them is an inverse.

    dispatch_preprocess (local), token_dispatch (communicates), dispatch_postprocess (order for the experts); then
    combine_preprocess, token_combine (communicates), combine_postprocess.
    """

    def __init__(self, config: TransformerConfig, model_comm_pgs: ProcessGroupCollection | None = None) -> None:
        groups = groups_or_default(model_comm_pgs)
        self.config = config
        self.ep_group, self.tp_group, self.tp_ep_group = groups.ep, groups.expt_tp, groups.tp_ep
        self.ep_size, self.tp_size = get_pg_size(groups.ep), get_pg_size(groups.expt_tp)
        self.ep_rank, self.tp_rank = get_pg_rank(groups.ep), get_pg_rank(groups.expt_tp)
        self.shared_experts: Any = None

    @abstractmethod
    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """What is sent, and its weights. `tokens` [s, b, h]; `routing_map` [n, E] bool; `probs` [n, E]."""

    @abstractmethod
    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """What was received, and its weights. Communicates."""

    @abstractmethod
    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [m, h] in the order of experts, rows of each local expert [E/EP], weights [m])."""

    @abstractmethod
    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' rows in the order in which they are sent back."""

    @abstractmethod
    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """What comes back. Communicates."""

    @abstractmethod
    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h]: each token's sum over its experts."""

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Experts to be computed while tokens travel."""
        self.shared_experts = shared_experts


class MoEAllGatherTokenDispatcher(MoETokenDispatcher):
    """Every rank gets the tokens of all ranks of `tp_ep` and takes those of its experts.

    Communicates: all-gather of tokens, map and weights; reduce-scatter of results. Of use where experts per token are
    nearly as many as ranks.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, model_comm_pgs)
        self.first, self.num_local_experts = local_expert_indices[0], num_local_experts

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.shape, self.routing_map = tokens.shape, routing_map
        return tokens.reshape(-1, tokens.size(-1)), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        if get_pg_size(self.tp_ep_group) > 1:
            gathered_map = self.routing_map.new_empty(
                get_pg_size(self.tp_ep_group) * len(self.routing_map), self.routing_map.size(1)
            )
            all_gather_into_tensor(gathered_map, self.routing_map.contiguous(), self.tp_ep_group, "routing maps")
            self.routing_map = gathered_map
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_ep_group)
            probs = gather_from_sequence_parallel_region(probs, group=self.tp_ep_group)
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        local = slice(self.first, self.first + self.num_local_experts)
        chosen = self.routing_map[:, local]
        self.num_gathered = len(hidden_states)
        rows, weights, self.source = permute(hidden_states, chosen, probs[:, local])
        assert weights is not None
        return rows, chosen.sum(0), weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return unpermute(hidden_states, self.source, self.num_gathered)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        if get_pg_size(self.tp_ep_group) > 1:
            return reduce_scatter_to_sequence_parallel_region(hidden_states, self.tp_ep_group)
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self.shape)


class MoEAlltoAllTokenDispatcher(MoETokenDispatcher):
    """Every row goes to the rank of its expert, and only there.

    With `set_shared_experts`, those are computed while rows travel: their first product on the way to the experts,
    their second on the way back.

    Communicates: all-gather of counts over `tp_ep`; all-to-all of rows and weights over EP; all-gather of what arrived
    over ETP; back by reduce-scatter and all-to-all.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, model_comm_pgs)
        self.first, self.num_local_experts = local_expert_indices[0], num_local_experts
        # Chunks arrive by (ETP rank, EP rank, expert); experts want (expert, ETP rank, EP rank).
        count = self.tp_size * self.ep_size * num_local_experts
        sources = torch.arange(count, device=device.current_device()).view(-1, num_local_experts)
        self.by_expert = sources.t().reshape(-1)
        self.by_source = torch.argsort(self.by_expert)

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Rows of each local expert [E/EP], and from them how many rows each rank sends and gets."""
        counts = routing_map.sum(0)
        everywhere = counts.new_empty(self.tp_size * self.ep_size * len(counts))
        if get_pg_size(self.tp_ep_group) > 1:
            all_gather_into_tensor(everywhere, counts, self.tp_ep_group, "tokens per expert")
        else:
            everywhere.copy_(counts)
        local = slice(self.first, self.first + self.num_local_experts)
        arriving = everywhere.view(self.ep_size, self.tp_size, -1)[:, :, local].transpose(0, 1)  # [ETP, EP, E/EP]
        self.input_splits = counts.view(self.ep_size, -1).sum(1).tolist()
        self.output_splits = arriving[self.tp_rank].sum(1).tolist()
        self.gathered_splits = arriving.sum((1, 2)).tolist()
        self.chunk_sizes = arriving.reshape(-1)
        return arriving.sum((0, 1))

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.shape = tokens.shape
        self.tokens_per_expert = self.preprocess(routing_map)
        rows, weights, self.source = permute(tokens.reshape(-1, tokens.size(-1)), routing_map, probs)
        assert weights is not None
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        return rows, weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        splits = (self.output_splits, self.input_splits)
        if self.shared_experts is None:
            rows, weights = (all_to_all(self.ep_group, x, *splits) for x in (hidden_states, probs))
        else:
            compute = self.shared_experts.linear_fc1_forward_and_act
            rows, weights = exchange_during(compute, (hidden_states, probs), self.ep_group, *splits)
        return self._of_all_parts(rows), self._of_all_parts(weights)

    def _of_all_parts(self, rows: Tensor) -> Tensor:
        """The rows of all ranks that hold a part of these experts."""
        if self.tp_size > 1:
            rows = gather_from_sequence_parallel_region(
                rows, group=self.tp_group, output_split_sizes=self.gathered_splits
            )
        return rows

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.num_local_experts > 1:
            hidden_states, sorted_probs = sort_chunks_by_idxs(hidden_states, self.chunk_sizes, self.by_expert, probs)
            assert sorted_probs is not None
            probs = sorted_probs
        return hidden_states, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        if self.num_local_experts == 1:
            return hidden_states
        return sort_chunks_by_idxs(hidden_states, self.chunk_sizes[self.by_expert], self.by_source)[0]

    def token_combine(
        self, hidden_states: Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> Tensor:
        if self.tp_size > 1:
            hidden_states = reduce_scatter_to_sequence_parallel_region(
                hidden_states, self.tp_group, self.gathered_splits
            )
        splits = (self.input_splits, self.output_splits)
        if self.shared_experts is None:
            return all_to_all(self.ep_group, hidden_states, *splits)
        compute = self.shared_experts.linear_fc2_forward
        return exchange_during(compute, (hidden_states,), self.ep_group, *splits)[0]

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        num_tokens = self.shape[:-1].numel()
        output = unpermute(permutated_local_input_tokens, self.source, num_tokens).view(self.shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()


DISPATCHERS: dict[str, type[MoEAllGatherTokenDispatcher] | type[MoEAlltoAllTokenDispatcher]] = {
    "allgather": MoEAllGatherTokenDispatcher,
    "alltoall": MoEAlltoAllTokenDispatcher,
}
"""By `moe_token_dispatcher_type`."""
