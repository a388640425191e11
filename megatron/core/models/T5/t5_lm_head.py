"""What stands between T5's decoder and the loss."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class T5LMHead(MegatronModule):
    """Scores of the vocabulary, sharded over the tensor parallel ranks; with a bias where the weight is tied.

    hidden_states [s, b, h] (sequence parallel [s/tp, b, h], all-gathered) -> [s, b, v/tp].

    Args:
        parallel_output: give this rank's part of the vocabulary, not all of it.
        vocab_size: padded size of the vocabulary.
        pre_process: this stage has the embedding, whose weight serves as the tied one.
        share_embeddings_and_output_weights: the weight is the embedding's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parallel_output: bool,
        vocab_size: int,
        pre_process: bool = True,
        share_embeddings_and_output_weights: bool = False,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config)
        assert config.init_method is not None
        self.parallel_output = parallel_output
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=share_embeddings_and_output_weights,
            skip_bias_add=False,
            gather_output=not parallel_output,
            skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor, word_embeddings_weight: Tensor | None = None) -> Tensor:
        """Logits [s, b, v/tp]; `word_embeddings_weight` [v/tp, h] is the tied weight."""
        logits, _ = self.output_layer(hidden_states, weight=word_embeddings_weight)
        return logits
