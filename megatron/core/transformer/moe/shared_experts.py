"""Experts that see every token (arXiv:2401.06066, section 3.2): one feed-forward block of their total width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import make_sharded_tensor_for_checkpoint


class SharedExpertMLP(MLP):
    """An `MLP` of width `moe_shared_expert_intermediate_size`, cut like a dense one.

    Args:
        gate: multiply each token's result by sigmoid(x · g), g [1, h] learnt; so does `moe_shared_expert_gate`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        groups = groups_or_default(model_comm_pgs)
        width = config.moe_shared_expert_intermediate_size
        super().__init__(config, submodules, ffn_hidden_size=width, tp_group=groups.tp)
        self.tp_group = groups.tp
        self._input: Tensor | None = None
        self._between: Tensor | None = None
        self.gate_weight: nn.Parameter | None = None
        if gate or config.moe_shared_expert_gate:
            empty = torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=parameter_device(config))
            self.gate_weight = nn.Parameter(empty)
            self.gate_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            assert config.init_method is not None
            register_parameter_init(
                self.gate_weight, config.init_method, perform_initialization=config.perform_initialization
            )

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[s, b, h] (sequence parallel [s/tp, b, h]), to be added to the other experts' output."""
        output, _ = super().forward(hidden_states)
        return self._gated(output, hidden_states)

    def _gated(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        if self.gate_weight is None:
            return output
        return output * torch.sigmoid(nn.functional.linear(hidden_states, self.gate_weight))

    # --- the same in steps, for a dispatcher whose tokens travel in between ---

    def pre_forward_comm(self, input: Tensor) -> None:
        """Note what `forward` would be called with."""
        self._input, self._between = input, None

    def linear_fc1_forward_and_act(self, overlapped_comm_output: Tensor | None = None) -> None:
        """Up to the activations. `overlapped_comm_output` is kept for the public interface."""
        assert self._input is not None
        self._between = self.activate(*self.linear_fc1(self._input))

    def linear_fc2_forward(self, overlapped_comm_output: Tensor | None = None) -> None:
        """The rest, but for the gate. `overlapped_comm_output` is kept for the public interface."""
        self._between = self.linear_fc2(self._between)[0]

    def get_output(self) -> Tensor:
        """What `forward` returns; the steps begin anew."""
        output, hidden_states = self._between, self._input
        assert output is not None and hidden_states is not None
        self._input = self._between = None
        return self._gated(output, hidden_states)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As of `MLP`, and the gate."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gate_weight is not None:
            key = f"{prefix}gate_weight"
            sharded[key] = make_sharded_tensor_for_checkpoint(
                self.gate_weight, key, prepend_offsets=sharded_offsets, tp_group=self.tp_group
            )
        return sharded
