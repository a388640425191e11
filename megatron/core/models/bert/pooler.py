"""One vector for a whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.core.models.bert.replicated_linear import replicated_linear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Pooler(MegatronModule):
    """tanh(W x + b) of one token, the same on every tensor parallel rank.

    hidden_states [s, b, h] -> [b, h]. With sequence parallelism [s/tp, b, h] is all-gathered first.

    Args:
        init_method: kept for the public interface; `config.init_method` decides.
        sequence_parallel: whether `hidden_states` are part of the sequence.
    """

    def __init__(
        self,
        hidden_size: int,
        init_method: Callable[[Tensor], object] | None,
        config: TransformerConfig,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(config)
        self.dense = replicated_linear(hidden_size, hidden_size, config)
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden_states: Tensor, sequence_index: int = 0) -> Tensor:
        """The vector of token `sequence_index`, [b, h]."""
        if self.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return torch.tanh(self.dense(hidden_states[sequence_index]))
