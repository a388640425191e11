"""A mixture of experts in place of the feed-forward block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import DISPATCHERS
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import divide, get_pg_rank, get_pg_size


@dataclass
class MoESubmodules:
    """Parts of `MoELayer`."""

    experts: ModuleSpec | type | None = None
    shared_experts: ModuleSpec | type | None = None


class BaseMoELayer(MegatronModule, ABC):
    """Which of the E experts are on this rank: E/EP neighbours."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert config.num_moe_experts is not None
        groups = groups_or_default(model_comm_pgs)
        self.layer_number = layer_number
        self.attn_tp_size = get_pg_size(groups.tp)
        self.num_local_experts = divide(config.num_moe_experts, get_pg_size(groups.ep))
        first = get_pg_rank(groups.ep) * self.num_local_experts
        self.local_expert_indices = list(range(first, first + self.num_local_experts))

    @abstractmethod
    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(output, bias to be added or None); `padding_mask` as of `TopKRouter`."""

    @abstractmethod
    def set_layer_number(self, layer_number: int) -> None:
        """Which layer (from 1) this is, for the log."""


class MoELayer(BaseMoELayer):
    """y = Σ_e w_e(x) expert_e(x) over the chosen experts e, plus the shared experts' output.

    hidden_states [s, b, h] -> the same; sequence parallel [s/tp, b, h]. Communicates as its dispatcher does.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, layer_number, model_comm_pgs)
        groups = groups_or_default(model_comm_pgs)
        submodules = submodules or MoESubmodules()
        self.router = TopKRouter(config, groups)
        if layer_number is not None:
            self.set_layer_number(layer_number)
        dispatcher = DISPATCHERS[config.moe_token_dispatcher_type]
        self.token_dispatcher = dispatcher(self.num_local_experts, self.local_expert_indices, config, groups)
        assert submodules.experts is not None
        self.experts = build_module(submodules.experts, self.num_local_experts, config, model_comm_pgs=groups)
        self.shared_experts = None
        if config.moe_shared_expert_intermediate_size is not None:
            assert submodules.shared_experts is not None
            self.shared_experts = build_module(submodules.shared_experts, config=config, model_comm_pgs=groups)
            if config.moe_shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)

    def router_and_preprocess(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows to send, their weights, the input of the shared experts)."""
        probs, routing_map = self.router(hidden_states, padding_mask)
        rows, probs = self.token_dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
        return rows, probs, hidden_states

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights that arrive here. Communicates."""
        return self.token_dispatcher.token_dispatch(hidden_states, probs)

    def experts_compute(self, hidden_states: Tensor, probs: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the experts' rows, in the order to be sent back; the shared experts' output of `residual`, None where the
        dispatcher computes it)."""
        alone = self.shared_experts is None or self.config.moe_shared_expert_overlap
        shared = None if alone else self.shared_experts(residual)  # type: ignore[misc]
        rows, tokens_per_expert, probs = self.token_dispatcher.dispatch_postprocess(hidden_states, probs)
        output, _ = self.experts(rows, tokens_per_expert, probs)
        return self.token_dispatcher.combine_preprocess(output), shared

    def combine(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Each token's sum. Communicates."""
        output = self.token_dispatcher.combine_postprocess(self.token_dispatcher.token_combine(output))
        return output if shared_expert_output is None else output + shared_expert_output

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(output, no bias).

        Args:
            padding_mask: [s, b] of this rank's hidden states, True where there is no token: nothing is learned there
                about the load of experts.

        Raises:
            ValueError: training with tensor but without sequence parallelism, where each rank of a tensor parallel
                group would send the same tokens.
        """
        if self.training and self.attn_tp_size > 1 and not self.config.sequence_parallel:
            raise ValueError("training experts with tensor parallelism needs sequence_parallel")
        rows, probs, residual = self.router_and_preprocess(hidden_states, padding_mask)
        rows, probs = self.dispatch(rows, probs)
        output, shared = self.experts_compute(rows, probs, residual)
        return self.combine(output, shared), None
