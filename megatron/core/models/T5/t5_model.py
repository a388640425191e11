"""T5 (Raffel et al., arXiv:1910.10683): an encoder, and a decoder that looks at the encoder's output.

s sequence (e of the encoder, d of the decoder), b microbatch, h hidden, v vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.T5.t5_lm_head import T5LMHead
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.initialization import deferred_initialization, initialize_parameters
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import pipeline_rank

POSITIONS = ("learned_absolute", "rope", "relative")
LayerSpec = ModuleSpec | TransformerBlockSubmodules
Mask = Tensor | tuple[Tensor, Tensor] | None


class T5Model(LanguageModule):
    """Embedding, encoder, decoder and head: those of them that this pipeline stage holds.

    In a pipeline the `config.pipeline_model_parallel_split_rank` stages of the encoder come first. They pass hidden
    states [e, b, h]; the last of them passes the encoder's output. The first stage of the decoder embeds the decoder's
    tokens with a copy of the embedding. Stages of the decoder pass their hidden states and, behind them along the
    sequence, the encoder's output, [d + e, b, h]: its gradient comes back the same way.

    Initial weights depend on the seed and nothing else: every layout starts from the same model.

    Args:
        config: of the decoder, and of what both stacks share.
        encoder_config: of the encoder.
        transformer_encoder_layer_spec: of one layer for all, or of the encoder's block.
        transformer_decoder_layer_spec: the same of the decoder.
        vocab_size: padded size of the vocabulary.
        max_sequence_length: the longer of the two sequences; the number of learned positions.
        pre_process: this stage is the first of its stack (or both stacks are here).
        post_process: this stage is the last of its stack.
        fp16_lm_cross_entropy: kept for the public interface; the loss is computed in fp32 from logits of any type.
        parallel_output: without labels, give logits sharded over the vocabulary instead of gathering them.
        share_embeddings_and_output_weights: the output weight is the embedding's, and the head has a bias.
        position_embedding_type: learned positions are shared by both stacks; relative ones are a table for each.
        rotary_percent, seq_len_interpolation_factor, rotary_base: see `RotaryEmbedding`.
        relative_attention_num_buckets, relative_attention_max_distance: see `RelativePositionEmbedding`.
        add_encoder, add_decoder: this stage holds layers of that stack.
        true_vocab_size: size of the vocabulary without padding; padding columns take no part in the loss.
    """

    output_layer_name = "lm_head.output_layer"
    xattn_needed = True
    """Stages of the decoder need the encoder's output."""

    def __init__(
        self,
        config: TransformerConfig,
        encoder_config: TransformerConfig,
        transformer_encoder_layer_spec: LayerSpec,
        transformer_decoder_layer_spec: LayerSpec,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: Literal["learned_absolute", "rope", "relative"] = "learned_absolute",
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: float | None = None,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        add_encoder: bool = True,
        add_decoder: bool = True,
        model_comm_pgs: ProcessGroupCollection | None = None,
        *,
        rotary_base: float = 10000,
        true_vocab_size: int | None = None,
    ) -> None:
        super().__init__(config, model_comm_pgs)
        if position_embedding_type not in POSITIONS:
            raise ValueError(f"position_embedding_type {position_embedding_type!r}: a T5 has {', '.join(POSITIONS)}")
        if config.context_parallel_size > 1:
            raise NotImplementedError(
                f"context_parallel_size ({config.context_parallel_size}): T5 does not split sequences"
            )
        self.encoder_config = encoder_config
        self.vocab_size, self.true_vocab_size = vocab_size, true_vocab_size
        self.max_sequence_length = max_sequence_length
        self.add_encoder, self.add_decoder = add_encoder, add_decoder
        self.pre_process = pre_process
        self.post_process = post_process and add_decoder
        """This stage has the head: the last of the decoder, not of the encoder."""
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.model_type = ModelType.encoder_and_decoder
        self.relative_sizes = relative_attention_num_buckets, relative_attention_max_distance
        self._received: Tensor | None = None
        with deferred_initialization():
            if pre_process:
                self.embedding = LanguageModelEmbedding(
                    config,
                    vocab_size,
                    max_sequence_length,
                    "learned_absolute" if position_embedding_type == "learned_absolute" else "none",
                    tp_group=self.model_comm_pgs.tp,
                )
            self.rotary_pos_emb = self.plain_rotary_embedding(rotary_percent, seq_len_interpolation_factor, rotary_base)
            if add_encoder:
                self.encoder_relative_pos_emb = self._relative(encoder_config, bidirectional=True)
                last = post_process or add_decoder
                self.encoder = self._stack(encoder_config, transformer_encoder_layer_spec, pre_process, last)
            if add_decoder:
                self.decoder_relative_pos_emb = self._relative(config, bidirectional=False)
                self.decoder = self._stack(config, transformer_decoder_layer_spec, pre_process, post_process)
            if self.post_process:
                self.lm_head = T5LMHead(
                    config,
                    parallel_output,
                    vocab_size,
                    pre_process,
                    share_embeddings_and_output_weights,
                    tp_group=self.model_comm_pgs.tp,
                )
        self.setup_embeddings_and_output_layer()
        initialize_parameters(self, global_name=self.global_parameter_name)

    # --- construction ---

    def _stack(self, config: TransformerConfig, spec: LayerSpec, first: bool, last: bool) -> TransformerBlock:
        return TransformerBlock(config, spec, pre_process=first, post_process=last, model_comm_pgs=self.model_comm_pgs)

    def _relative(self, config: TransformerConfig, bidirectional: bool) -> RelativePositionEmbedding | None:
        if self.position_embedding_type != "relative":
            return None
        assert config.init_method is not None
        return RelativePositionEmbedding(
            bidirectional,
            config.init_method,
            config.num_attention_heads,
            *self.relative_sizes,
            config=config,
            tp_group=self.model_comm_pgs.tp,
        )

    @property
    def output_layer(self) -> nn.Module:
        """The head's linear layer; only on the last stage."""
        return self.lm_head.output_layer

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark weights of which several stages hold a copy; the first of these stages counts them in norms.

        `shared_embedding` gives them gradient buckets of their own, which the ranks of all these stages shard alike.
        """
        super().setup_embeddings_and_output_layer()
        if self.add_encoder and self.add_decoder:
            return
        for param in (*self.weights_of_both_stacks(), *self.weights_of_every_stage().values()):
            if param is not None:
                param.shared_embedding = True  # type: ignore[attr-defined]
        if self.pre_process:
            self.embedding.word_embeddings.weight.shared_embedding = True  # type: ignore[attr-defined]
        for param in self._copies():
            param.shared = True  # type: ignore[attr-defined]

    def _copies(self) -> list[nn.Parameter]:
        """Those parameters of this stage that an earlier stage holds too, but for a tied output weight."""
        found = list(self.embedding.parameters()) if self.pre_process and not self.add_encoder else []
        if not self.pre_process:
            found += [param for param in self.weights_of_every_stage().values() if param is not None]
        return found

    # --- what stages have in common; `finalize_model_grads` sums the gradients ---

    def weights_of_both_stacks(self) -> list[nn.Parameter]:
        """Parameters that the first stages of encoder and decoder both hold, if a pipeline parts them.

        Not among them: tied word embeddings, which the last stage holds too.
        """
        if not self.pre_process or (self.add_encoder and self.add_decoder):
            return []
        tied = self.share_embeddings_and_output_weights
        word = self.embedding.word_embeddings.weight
        return [param for param in self.embedding.parameters() if not (tied and param is word)]

    def weights_of_every_stage(self) -> dict[str, nn.Parameter | None]:
        """Parameters that all stages of a stack hold, by names that are the same on every stage; None where this stage
        is of the other stack."""
        if self.position_embedding_type != "relative":
            return {}
        tables = {name: getattr(self, f"{name}_relative_pos_emb", None) for name in ("encoder", "decoder")}
        return {name: None if table is None else table.relative_attention_bias.weight for name, table in tables.items()}

    # --- forward ---

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """What the previous stage has passed on."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if len(tensors) != 1:
            raise ValueError(f"a T5 stage takes one input tensor, got {len(tensors)}")
        self._received = tensors[0]

    def forward(
        self,
        encoder_input_ids: Tensor,
        decoder_input_ids: Tensor,
        encoder_attn_mask: Mask,
        decoder_attn_mask: Mask,
        encoder_decoder_attn_mask: Mask,
        lm_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_encoder_hidden_only: bool = False,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        *,
        inference_params: Any = None,
    ) -> Tensor:
        """On the last stage the loss of each decoder token, [b, d] fp32, or without labels the logits [b, d, v] (or
        [b, d, v/tp], see `parallel_output`); before it, what the next stage takes.

        Args:
            encoder_input_ids: [b, e].
            decoder_input_ids: [b, d].
            encoder_attn_mask: True where a key is hidden, [b, e, e] or what broadcasts to [b, 1, e, e]; None hides
                nothing.
            decoder_attn_mask: the same, [b, d, d]; None is causal.
            encoder_decoder_attn_mask: the same, [b, d, e]; of a pair of padding masks the second counts.
            lm_labels: [b, d].
            encoder_hidden_states: the encoder's output [e, b, h], which then is not computed.
            output_encoder_hidden_only: stop after the encoder and give its output.
            inference_context: an `EncoderDecoderContext`. The decoder computes one token of each text; the encoder
                takes part in passes over new texts only, in others `encoder_input_ids` say no more than how many rows
                stages pass on. Masks of the decoder are the context's matter.
        """
        if packed_seq_params is not None:
            raise NotImplementedError("packed_seq_params: T5 takes one sample a row")
        context = inference_context if inference_context is not None else inference_params
        encoder_mask, decoder_mask, cross_mask = t5_extended_attention_mask(
            [encoder_attn_mask, decoder_attn_mask, encoder_decoder_attn_mask]
        )
        hidden_states: Tensor | None = None
        encodes = context is None or context.encodes
        if encoder_hidden_states is None and self.add_encoder:
            encode = self._encode if encodes else self._nothing_encoded
            encoder_hidden_states = encode(encoder_input_ids, encoder_mask)
        elif encoder_hidden_states is None:
            hidden_states, encoder_hidden_states = self._unpacked(decoder_input_ids.size(1))
        assert encoder_hidden_states is not None
        if output_encoder_hidden_only or not self.add_decoder:
            return self._as_residual(encoder_hidden_states)
        read = encoder_hidden_states if encodes else None
        hidden_states = self._decode(decoder_input_ids, hidden_states, decoder_mask, read, cross_mask, context)
        if not self.post_process:
            return torch.cat((hidden_states, self._as_residual(encoder_hidden_states)))
        tied = self.share_embeddings_and_output_weights
        logits = self.lm_head(hidden_states, self.shared_embedding_or_output_weight() if tied else None)
        if lm_labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(lm_labels, logits)

    def _encode(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """[e, b, h], after the encoder's layers of this stage."""
        hidden_states = self.embedding(ids, t5_position_ids(ids)) if self.pre_process else None
        self.encoder.set_input_tensor(self._received)  # type: ignore[arg-type]
        length = ids.size(1)
        return self.encoder(
            hidden_states,
            mask,
            rotary_pos_emb=None if self.rotary_pos_emb is None else self.rotary_pos_emb(length),
            attention_bias=None
            if self.encoder_relative_pos_emb is None
            else self.encoder_relative_pos_emb(length, length),
        )

    def _nothing_encoded(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Zeros [e, b, h] in the place of an output that is kept where it is needed."""
        config = self.encoder_config
        length = ids.size(1) // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        return torch.zeros(length, ids.size(0), config.hidden_size, dtype=config.params_dtype, device=ids.device)

    def _decode(
        self,
        ids: Tensor,
        received: Tensor | None,
        mask: Tensor | None,
        encoder_output: Tensor | None,
        cross_mask: Tensor | None,
        inference_context: Any,
    ) -> Tensor:
        """[d, b, h], after the decoder's layers of this stage."""
        positions = t5_position_ids(ids) if inference_context is None else inference_context.current_position_ids()
        hidden_states = self.embedding(ids, positions) if self.pre_process else None
        self.decoder.set_input_tensor(received)  # type: ignore[arg-type]
        angles = None
        if self.rotary_pos_emb is not None and inference_context is None:
            angles = self.rotary_pos_emb(ids.size(1))
        elif self.rotary_pos_emb is not None:
            angles = self.rotary_pos_emb(inference_context.max_decoded_length)[positions.t(), 0]
        return self.decoder(
            hidden_states,
            mask,
            context=encoder_output,
            context_mask=cross_mask,
            rotary_pos_emb=angles,
            attention_bias=self._decoder_bias(ids.size(1), inference_context),
            inference_context=inference_context,
        )

    def _decoder_bias(self, length: int, inference_context: Any) -> Tensor | None:
        """What is added to the scores of the decoder's self attention."""
        if self.decoder_relative_pos_emb is None:
            return None
        if inference_context is None:
            return self.decoder_relative_pos_emb(length, length)
        return inference_context.relative_bias(self.decoder_relative_pos_emb.at)

    def _unpacked(self, decoder_length: int) -> tuple[Tensor | None, Tensor]:
        """(hidden states, the encoder's output) of what a stage of the decoder has received; its first one receives
        no hidden states."""
        assert self._received is not None
        own = 0
        if not self.pre_process:
            own = decoder_length // (self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1)
        hidden_states, encoder_output = self._received.split((own, self._received.size(0) - own))
        return hidden_states if own else None, encoder_output.to(self.config.params_dtype)

    def _as_residual(self, encoder_output: Tensor) -> Tensor:
        """In the type in which stages pass activations."""
        return encoder_output.float() if self.config.fp32_residual_connection else encoder_output

    # --- checkpoints ---

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As of the parts; what earlier stages hold too is described as a further copy.

        Raises:
            ValueError: `sharded_offsets` is not empty.
        """
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        copies = {id(param) for param in self._copies()}
        stage = pipeline_rank(self.model_comm_pgs.pp)
        for name, param in self.named_parameters():
            if id(param) in copies:
                described = sharded[f"{prefix}{name}"]
                described.replica_id = (stage, *described.replica_id[1:])
        return sharded


def t5_extended_attention_mask(attention_mask_list: list[Mask]) -> list[Tensor | None]:
    """Masks [b, queries, keys] with an axis for the heads, [b, 1, queries, keys]; those that have it as they are. Of a
    pair of padding masks (decoder's, encoder's) the second, which says what cross attention may not see."""
    masks = [mask[1] if isinstance(mask, tuple) else mask for mask in attention_mask_list]
    return [mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask for mask in masks]


def t5_position_ids(token_ids: Tensor) -> Tensor:
    """Positions [b, s] of tokens [b, s], from 0 on."""
    return torch.arange(token_ids.size(1), device=token_ids.device).expand_as(token_ids)
