"""What stands between BERT's encoder and its vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.bert.replicated_linear import replicated_linear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class BertLMHead(MegatronModule):
    """LayerNorm(gelu(W x + b)), the same on every tensor parallel rank (the masked-LM head of arXiv:1810.04805).

    hidden_states [s, b, h] (sequence parallel [s/tp, b, h]) -> the same shape.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig) -> None:
        super().__init__(config)
        self.dense = replicated_linear(
            hidden_size, hidden_size, config, sees_part_of_sequence=bool(config.sequence_parallel)
        )
        self.layer_norm = FusedLayerNorm(config, hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer_norm(gelu(self.dense(hidden_states)))
