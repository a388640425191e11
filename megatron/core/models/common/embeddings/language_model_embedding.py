"""Embedding of tokens, positions and token types. s sequence, b microbatch, h hidden, v vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.fusions.dropout import dropout
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class LanguageModelEmbedding(MegatronModule):
    """Word embeddings (rows sharded over the tensor parallel ranks) plus learned positions and token types
    (whole).

    input_ids [b, s] -> look-up -> all-reduce -> [s, b, h]. With sequence parallelism the result is [s/tp, b,
    h]: the look-up ends in a reduce-scatter, or, where positions or types are added to it, in an all-reduce
    and a split.

    Args:
        vocab_size: padded size of the vocabulary.
        max_sequence_length: number of learned positions.
        position_embedding_type: only `learned_absolute` adds anything here.
        num_tokentypes: number of token types, 0 for none.
        scatter_to_sequence_parallel: give this rank's part under sequence parallelism.
    """

    fsdp_unit = True
    """Fully sharded, its weights are gathered together."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute",
        num_tokentypes: int = 0,
        scatter_to_sequence_parallel: bool = True,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config)
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.add_position_embedding = position_embedding_type == "learned_absolute"
        self.num_tokentypes = num_tokentypes
        self.scatter_to_sequence_parallel = scatter_to_sequence_parallel
        self.tp_group = tp_group
        self.reduce_scatter_embeddings = (
            not self.add_position_embedding
            and num_tokentypes <= 0
            and config.sequence_parallel
            and scatter_to_sequence_parallel
        )
        assert config.init_method is not None
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=self.reduce_scatter_embeddings,
            config=config,
            tp_group=tp_group,
        )
        if self.add_position_embedding:
            self.position_embeddings = self._whole_table(max_sequence_length)
        self.tokentype_embeddings = self._whole_table(num_tokentypes) if num_tokentypes > 0 else None

    def _whole_table(self, rows: int) -> nn.Embedding:
        config = self.config
        table = nn.Embedding.from_pretrained(
            torch.empty(rows, config.hidden_size, dtype=config.params_dtype, device=parameter_device(config)),
            freeze=False,
        )
        assert config.init_method is not None
        register_parameter_init(table.weight, config.init_method, perform_initialization=config.perform_initialization)
        return table

    def zero_parameters(self) -> None:
        """Set all embeddings to zero and mark them as shared with another stage."""
        for param in self.parameters():
            param.data.zero_()
            param.shared = True  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, tokentype_ids: Tensor | None = None) -> Tensor:
        """Embeddings [s, b, h], with sequence parallelism [s/tp, b, h].

        Args:
            input_ids: [b, s].
            position_ids: [b, s]; needed for learned positions only.
            tokentype_ids: [b, s]; given exactly when there are token types.

        Raises:
            ValueError: token types are given or lacking against the model, or a position lies beyond the
                last.
        """
        if (tokentype_ids is None) != (self.tokentype_embeddings is None):
            raise ValueError(
                f"tokentype_ids {'missing' if tokentype_ids is None else 'given'}, "
                f"num_tokentypes is {self.num_tokentypes}"
            )
        if self.reduce_scatter_embeddings:
            return self._drop(self._to_residual_type(self.word_embeddings(input_ids)))
        embeddings = self.word_embeddings(input_ids.transpose(0, 1))  # [s, b, h]
        if self.add_position_embedding:
            assert position_ids is not None
            if self._is_beyond_the_last(position_ids):
                raise ValueError(
                    f"a sequence of {position_ids.size(-1)} tokens is longer than the "
                    f"{self.max_sequence_length} learned positions (max_sequence_length)"
                )
            embeddings = embeddings + self.position_embeddings(position_ids.transpose(0, 1))
        if self.tokentype_embeddings is not None and tokentype_ids is not None:
            embeddings = embeddings + self.tokentype_embeddings(tokentype_ids.transpose(0, 1))
        embeddings = self._to_residual_type(embeddings)
        if self.config.sequence_parallel and self.scatter_to_sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, self.tp_group)
        return self._drop(embeddings)

    def _is_beyond_the_last(self, position_ids: Tensor) -> bool:
        """Whether a position has no embedding. Tokens of many texts in a row may be more than there are positions."""
        return position_ids.size(-1) > self.max_sequence_length and int(position_ids.max()) >= self.max_sequence_length

    def _to_residual_type(self, embeddings: Tensor) -> Tensor:
        return embeddings.float() if self.config.fp32_residual_connection else embeddings

    def _drop(self, embeddings: Tensor) -> Tensor:
        """Dropout; ranks that hold different tokens draw different numbers."""
        p = self.config.hidden_dropout
        if p == 0.0 or not self.training:
            return embeddings
        if self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                return dropout(embeddings, p, training=True)
        return dropout(embeddings, p, training=True)
