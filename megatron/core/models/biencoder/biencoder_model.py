"""Two BERTs that give queries and passages vectors whose inner product says how well they fit (Lee et al.,
arXiv:1906.00300, section 3; Guu et al., arXiv:2002.08909, section 3.2).

s sequence, b microbatch, h hidden, p projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.bert.replicated_linear import replicated_linear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.initialization import deferred_initialization, initialize_parameters
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default

PROJECTION = "projection_enc"


class TextEmbedder(BertModel):
    """Embedding and encoder of a `BertModel`; the vector of a text is what its first token becomes.

    With `projection_dim` a linear layer, `projection_enc`, makes it that wide. All else has the names and shapes of a
    pretrained `BertModel`. [b, s] tokens -> [b, p], without a projection [b, h]; equal on all tensor parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        projection_dim: int = 0,
        **others: Any,
    ) -> None:
        self.projection_dim = projection_dim
        super().__init__(
            config,
            num_tokentypes,
            transformer_layer_spec,
            vocab_size,
            max_sequence_length,
            add_binary_head=False,
            **others,
        )

    def _build_heads(self) -> None:
        if self.projection_dim:
            projection = replicated_linear(self.config.hidden_size, self.projection_dim, self.config)
            self.add_module(PROJECTION, projection)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """The vectors of texts; mask [b, s] is 1 on real tokens. Of types of tokens, where there are some, all have the
        first."""
        types = torch.zeros_like(input_ids) if self.embedding.tokentype_embeddings is not None else None
        vectors = super().forward(input_ids, attention_mask, types)
        assert isinstance(vectors, Tensor)
        return vectors

    def _read_out(self, hidden_states: Tensor, attention_mask: Tensor, lm_labels: Tensor | None) -> Tensor:
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.model_comm_pgs.tp
            )
        first = hidden_states[0]
        return self.projection_enc(first) if self.projection_dim else first  # type: ignore[operator]


class BiEncoderModel(MegatronModule):
    """`query_model` and `context_model`, two `TextEmbedder`s; or one `shared_model` for both.

    Initial weights depend on the seed, and not on the layout.

    Args:
        projection_dim: width of the vectors; 0 takes the hidden states as they are.
        shared: queries and passages go through the same weights.
        others: of each `TextEmbedder`.

    Raises:
        ValueError: the model is cut into pipeline stages: one stream of activations cannot carry both encoders.
    """

    pre_process = post_process = True
    share_embeddings_and_output_weights = False
    vp_stage: int | None = None

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        projection_dim: int = 0,
        *,
        shared: bool = False,
        model_comm_pgs: ProcessGroupCollection | None = None,
        **others: Any,
    ) -> None:
        super().__init__(config)
        if config.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"pipeline_model_parallel_size {config.pipeline_model_parallel_size}: a pipeline carries the "
                "activations of one encoder, retrieval has two; use tensor_model_parallel_size"
            )
        self.shared, self.model_comm_pgs = shared, groups_or_default(model_comm_pgs)
        self.model_type = ModelType.encoder_or_decoder
        with deferred_initialization():
            for name in ("shared_model",) if shared else ("query_model", "context_model"):
                embedder = TextEmbedder(
                    config,
                    num_tokentypes,
                    transformer_layer_spec,
                    vocab_size,
                    max_sequence_length,
                    projection_dim,
                    model_comm_pgs=self.model_comm_pgs,
                    **others,
                )
                self.add_module(name, embedder)
        initialize_parameters(self)

    @property
    def embedders(self) -> dict[str, TextEmbedder]:
        """The encoders by name, each once."""
        return {name: child for name, child in self.named_children() if isinstance(child, TextEmbedder)}

    def embed_queries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[b, p] of tokens and mask (1 on real tokens) [b, s]."""
        return self.embedders["shared_model" if self.shared else "query_model"](tokens, mask)

    def embed_contexts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[b, p] of tokens and mask (1 on real tokens) [b, s]."""
        return self.embedders["shared_model" if self.shared else "context_model"](tokens, mask)

    def forward(
        self,
        query_tokens: Tensor | None = None,
        query_mask: Tensor | None = None,
        context_tokens: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(vectors of the queries, of the contexts) [b, p]; None of what is not given. Masks are 1 on real tokens."""
        queries = contexts = None
        if query_tokens is not None:
            assert query_mask is not None
            queries = self.embed_queries(query_tokens, query_mask)
        if context_tokens is not None:
            assert context_mask is not None
            contexts = self.embed_contexts(context_tokens, context_mask)
        return queries, contexts

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Nothing comes from another stage."""
