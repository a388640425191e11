"""What stands between T5's decoder and the loss."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.models.common.language_module.output_layer import build_output_layer
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
        self.parallel_output = parallel_output
        self.output_layer = build_output_layer(
            config,
            vocab_size,
            tied=share_embeddings_and_output_weights,
            pre_process=pre_process,
            bias=share_embeddings_and_output_weights,
            parallel_output=parallel_output,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor, word_embeddings_weight: Tensor | None = None) -> Tensor:
        """Logits [s, b, v/tp]; `word_embeddings_weight` [v/tp, h] is the tied weight."""
        logits, _ = self.output_layer(hidden_states, weight=word_embeddings_weight)
        return logits
