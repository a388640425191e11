"""BERT (Devlin et al., arXiv:1810.04805) with norms before the sublayers.

s sequence, b microbatch, h hidden, v vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.bert.replicated_linear import replicated_linear
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.common.language_module.output_layer import build_output_layer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.initialization import deferred_initialization, initialize_parameters
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

Output = Tensor | tuple[Tensor, Tensor | None]


class BertModel(LanguageModule):
    """Embedding, encoder, masked-LM head and sequence classifier: those of them that this pipeline chunk holds.

    Initial weights depend on the seed and nothing else: every layout starts from the same model.

    Args:
        num_tokentypes: kinds of tokens (first and second part of a pair), 0 for none.
        transformer_layer_spec: of one layer for all, or of the whole block.
        vocab_size: padded size of the vocabulary.
        max_sequence_length: longest sequence; the number of learned positions.
        pre_process: this chunk has the embedding.
        post_process: this chunk has the heads.
        fp16_lm_cross_entropy: kept for the public interface; the loss is computed in fp32 from logits of any type.
        parallel_output: without labels, give logits sharded over the vocabulary instead of gathering them.
        share_embeddings_and_output_weights: the output weight is the embedding's.
        rotary_percent, seq_len_interpolation_factor, rotary_base: see `RotaryEmbedding`.
        add_binary_head: classify sequences by their first token.
        return_embeddings: give one vector for each sequence instead: the mean of its tokens but the first and the last.
        vp_stage: virtual pipeline stage, None without interleaving.
        true_vocab_size: size of the vocabulary without padding; padding columns take no part in the loss.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute",
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: float | None = None,
        add_binary_head: bool = True,
        return_embeddings: bool = False,
        vp_stage: int | None = None,
        *,
        rotary_base: float = 10000,
        true_vocab_size: int | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, model_comm_pgs)
        if return_embeddings and not (post_process and add_binary_head):
            raise ValueError(
                "return_embeddings needs post_process and add_binary_head: the last stage of a BERT makes them"
            )
        if position_embedding_type not in ("learned_absolute", "rope"):
            raise ValueError(
                f"position_embedding_type {position_embedding_type!r}: a BERT has learned_absolute or rope"
            )
        self.vocab_size, self.true_vocab_size = vocab_size, true_vocab_size
        self.max_sequence_length = max_sequence_length
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.add_binary_head, self.return_embeddings = add_binary_head, return_embeddings
        self.model_type = ModelType.encoder_or_decoder
        with deferred_initialization():
            if pre_process:
                self.embedding = LanguageModelEmbedding(
                    config,
                    vocab_size,
                    max_sequence_length,
                    position_embedding_type,
                    num_tokentypes,
                    tp_group=self.model_comm_pgs.tp,
                )
            self.rotary_pos_emb = self.plain_rotary_embedding(rotary_percent, seq_len_interpolation_factor, rotary_base)
            self.encoder = TransformerBlock(
                config,
                transformer_layer_spec,
                pre_process=pre_process,
                post_process=post_process,
                model_comm_pgs=self.model_comm_pgs,
                vp_stage=vp_stage,
            )
            if post_process:
                self._build_heads()
        self.setup_embeddings_and_output_layer()
        initialize_parameters(self, global_name=self.global_parameter_name)

    def _build_heads(self) -> None:
        config = self.config
        self.lm_head = BertLMHead(config.hidden_size, config)
        self.output_layer = build_output_layer(
            config,
            self.vocab_size,
            tied=self.share_embeddings_and_output_weights,
            pre_process=self.pre_process,
            bias=True,
            parallel_output=self.parallel_output,
            tp_group=self.model_comm_pgs.tp,
        )
        self.binary_head = None
        if self.add_binary_head:
            assert config.init_method is not None
            self.binary_head = replicated_linear(config.hidden_size, 2, config)
            self.pooler = Pooler(config.hidden_size, config.init_method, config, config.sequence_parallel)

    def bert_extended_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """[b, 1, 1, s] bool, True on padding, of a mask [b, s] that is 1 on real tokens.

        Padding still looks at real tokens: nothing depends on what it sees, and no row is without a key.
        """
        return (attention_mask < 0.5)[:, None, None, :]

    def bert_position_ids(self, token_ids: Tensor) -> Tensor:
        """Positions [b, s] of tokens [b, s], from 0 on."""
        return torch.arange(token_ids.size(1), device=token_ids.device).expand_as(token_ids)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The previous stage's activations, which take the embedding's place."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if len(tensors) != 1:
            raise ValueError(f"a BERT stage takes one input tensor, got {len(tensors)}")
        self.encoder.set_input_tensor(tensors[0])

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        tokentype_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
    ) -> Output:
        """What the last stage gives is a pair; before it, the hidden states [s, b, h].

        The first of the pair is the loss of each token [b, s] fp32 if `lm_labels` are given (0 where the label is
        negative), else the logits [b, s, v] (or [b, s, v/tp], see `parallel_output`). The second is the scores of both
        classes of each sequence, [b, 2], None without a binary head. With `return_embeddings`: [b, h] fp32 alone.

        Args:
            input_ids: [b, s]; None on stages without the embedding.
            attention_mask: [b, s], 1 on real tokens.
            tokentype_ids: [b, s], for models with token types.
            lm_labels: [b, s], negative where nothing is to be predicted.
        """
        hidden_states = None
        if self.pre_process:
            assert input_ids is not None
            hidden_states = self.embedding(input_ids, self.bert_position_ids(input_ids), tokentype_ids)
        angles = None
        if self.rotary_pos_emb is not None:
            length = self.rotary_pos_emb.get_rotary_seq_len(None, self.encoder, hidden_states, self.config, None)
            angles = self.rotary_pos_emb(length)
            angles = angles[0] if isinstance(angles, tuple) else angles
        hidden_states = self.encoder(
            hidden_states=hidden_states,
            attention_mask=self.bert_extended_attention_mask(attention_mask),
            inference_context=inference_context if inference_context is not None else inference_params,
            rotary_pos_emb=angles,
        )
        if not self.post_process:
            return hidden_states
        return self._read_out(hidden_states, attention_mask, lm_labels)

    def _read_out(self, hidden_states: Tensor, attention_mask: Tensor, lm_labels: Tensor | None) -> Output:
        """What the last stage makes of the hidden states."""
        if self.return_embeddings:
            return self._mean_vectors(hidden_states, attention_mask)
        binary_logits = self.binary_head(self.pooler(hidden_states)) if self.binary_head is not None else None
        if lm_labels is None:
            return self._logits(hidden_states).transpose(0, 1).contiguous(), binary_logits
        return self._lm_loss(hidden_states, lm_labels), binary_logits

    def _logits(self, hidden_states: Tensor) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(self.lm_head(hidden_states), weight=weight)
        return logits

    def _lm_loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Loss of each token. Only hidden tokens, one in seven, go through the head, where all ranks see all tokens."""
        wanted = labels >= 0
        if self.config.sequence_parallel:
            loss = self.compute_language_model_loss(labels.clamp(min=0), self._logits(hidden_states))
            return torch.where(wanted, loss, 0.0)
        chosen = wanted.transpose(0, 1).flatten().nonzero().squeeze(1)  # in the order of [s, b]
        rows = hidden_states.flatten(0, 1).index_select(0, chosen).unsqueeze(1)
        targets = labels.transpose(0, 1).flatten().index_select(0, chosen)
        losses = self.compute_language_model_loss(targets.unsqueeze(0), self._logits(rows))  # [1, chosen]
        spread = losses.new_zeros(labels.numel()).index_copy(0, chosen, losses.squeeze(0))
        return spread.view(labels.size(1), labels.size(0)).transpose(0, 1)

    def _mean_vectors(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        lengths = attention_mask.sum(1, keepdim=True)
        position = torch.arange(hidden_states.size(0), device=hidden_states.device)[None]
        inner = ((position >= 1) & (position < lengths - 1)).float()  # [b, s]
        summed = torch.einsum("sbh,bs->bh", hidden_states.float(), inner)
        return summed / inner.sum(1, keepdim=True).clamp(min=1)
