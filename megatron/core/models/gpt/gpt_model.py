"""Decoder-only language model (GPT-2, Radford et al. 2019; with rotary positions, RMSNorm and SwiGLU: LLaMA,
arXiv:2302.13971). s sequence, b microbatch, h hidden, v vocabulary."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.common.language_module.output_layer import build_output_layer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.initialization import deferred_initialization, initialize_parameters
from megatron.core.tensor_parallel.weight_grad_queue import WeightGradQueue
from megatron.core.transformer.multi_latent_attention import rotary_embedding_of
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, build_block
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size

PositionEmbeddingType = Literal["learned_absolute", "rope", "yarn", "mrope", "none"]


class GPTModel(LanguageModule):
    """Embedding, transformer block, output layer: those of them that this pipeline chunk holds.

    Initial weights depend on the seed and nothing else: every layout starts from the same model.

    Args:
        transformer_layer_spec: of one layer for all, or of the whole block.
        vocab_size: padded size of the vocabulary.
        max_sequence_length: longest sequence; the number of learned positions.
        pre_process: this chunk has the embedding.
        post_process: this chunk has the output layer.
        fp16_lm_cross_entropy: kept for the public interface; the loss is computed in fp32 from logits of any
            type, without an fp32 copy of them.
        parallel_output: without labels, give logits sharded over the vocabulary instead of gathering them.
        share_embeddings_and_output_weights: the output weight is the embedding's.
        rotary_percent, rotary_base, rope_scaling, rope_scaling_factor, seq_len_interpolation_factor: see
            `RotaryEmbedding`.
        scatter_embedding_sequence_parallel: the embedding ends in a split under sequence parallelism.
        mtp_block_spec: modules that predict further tokens while training; the last chunk then has an embedding too.
        vp_stage: virtual pipeline stage, None without interleaving.
        true_vocab_size: size of the vocabulary without padding; padding columns of the logits take no part in
            the loss.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec | TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: PositionEmbeddingType = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        scatter_embedding_sequence_parallel: bool = True,
        seq_len_interpolation_factor: float | None = None,
        mtp_block_spec: MultiTokenPredictionBlockSubmodules | None = None,
        vp_stage: int | None = None,
        *,
        true_vocab_size: int | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, model_comm_pgs)
        self.mtp_process = post_process and mtp_block_spec is not None
        if self.mtp_process and position_embedding_type == "learned_absolute":
            raise ValueError("modules for further tokens embed no positions: use rotary positions, or none")
        self.vocab_size, self.true_vocab_size = vocab_size, true_vocab_size
        self.max_sequence_length = max_sequence_length
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.rotary_percent, self.rotary_base = rotary_percent, rotary_base
        self.model_type = ModelType.encoder_or_decoder
        self.input_tensor: Tensor | None = None
        self.output_weight_grads: WeightGradQueue | None = None
        """Products of the output layer's backward that wait for the pipeline's drain phase."""
        if post_process and config.defer_embedding_wgrad_compute:
            self.output_weight_grads = WeightGradQueue(config.wgrad_deferral_limit)
        with deferred_initialization():
            if pre_process or self.mtp_process:
                self.embedding = LanguageModelEmbedding(
                    config,
                    vocab_size,
                    max_sequence_length,
                    position_embedding_type,  # type: ignore[arg-type]
                    scatter_to_sequence_parallel=scatter_embedding_sequence_parallel,
                    tp_group=self.model_comm_pgs.tp,
                )
            self.rotary_pos_emb = self._rotary_embedding(
                rope_scaling, rope_scaling_factor, seq_len_interpolation_factor
            )
            self.decoder = build_block(
                config,
                transformer_layer_spec,
                pre_process=pre_process,
                post_process=post_process,
                model_comm_pgs=self.model_comm_pgs,
                vp_stage=vp_stage,
            )
            if self.mtp_process:
                assert mtp_block_spec is not None
                self.mtp = MultiTokenPredictionBlock(
                    config, mtp_block_spec, vp_stage, model_comm_pgs=self.model_comm_pgs
                )
            if post_process:
                self.output_layer = build_output_layer(
                    config,
                    vocab_size,
                    tied=share_embeddings_and_output_weights,
                    pre_process=pre_process or self.mtp_process,  # has the tied weight
                    parallel_output=parallel_output,
                    weight_grad_queue=self.output_weight_grads,
                    tp_group=self.model_comm_pgs.tp,
                )
        self.setup_embeddings_and_output_layer()
        initialize_parameters(self, global_name=self.global_parameter_name)

    def _rotary_embedding(
        self, rope_scaling: bool, rope_scaling_factor: float, seq_len_interpolation_factor: float | None
    ) -> RotaryEmbedding | MultimodalRotaryEmbedding | None:
        """Where the angles of positions come from; None without rotary positions.

        Raises:
            ValueError: the kind of position embedding is unknown, or settings of another kind are given.
        """
        config, kind = self.config, self.position_embedding_type
        factor = config.yarn_rotary_scaling_factor
        if (kind == "yarn") != (factor is not None):
            raise ValueError(
                f"position_embedding_type {kind!r} with yarn_rotary_scaling_factor={factor}: "
                "yarn needs a factor, and a factor needs yarn"
            )
        if isinstance(config, MLATransformerConfig):
            return rotary_embedding_of(config, self.model_comm_pgs.cp)
        if kind in ("learned_absolute", "none"):
            return None
        assert config.kv_channels is not None
        common: dict[str, Any] = {
            "kv_channels": config.kv_channels,
            "rotary_percent": self.rotary_percent,
            "rotary_interleaved": config.rotary_interleaved,
            "seq_len_interpolation_factor": seq_len_interpolation_factor,
            "rotary_base": self.rotary_base,
        }
        if kind == "mrope":
            return MultimodalRotaryEmbedding(**common)
        if kind == "rope":
            cp_group = self.model_comm_pgs.cp
            return RotaryEmbedding(
                **common,
                rope_scaling=rope_scaling,
                rope_scaling_factor=rope_scaling_factor,
                cp_group=cp_group,
            )
        if kind == "yarn":
            return YarnRotaryEmbedding(
                **common,
                scaling_factor=factor,  # type: ignore[arg-type]
                original_max_position_embeddings=config.yarn_original_max_position_embeddings
                or self.max_sequence_length,
                beta_fast=config.yarn_beta_fast,
                beta_slow=config.yarn_beta_slow,
                mscale=config.yarn_mscale,
                mscale_all_dim=config.yarn_mscale_all_dim,
                cp_group=self.model_comm_pgs.cp,
            )
        raise ValueError(f"position_embedding_type {kind!r}: a GPT has learned_absolute, rope, yarn, mrope or none")

    @property
    def decodes_from_states(self) -> bool:
        """With an inference context it computes new tokens only, and gives what a pass over the whole text would."""
        drops_tokens = self.config.moe_expert_capacity_factor is not None  # of a pass: depends on what else is in it
        return not drops_tokens and self.position_embedding_type != "mrope"

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The previous stage's activations, which take the embedding's place."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if len(tensors) != 1:
            raise ValueError(f"a GPT stage takes one input tensor, got {len(tensors)}")
        self.decoder.set_input_tensor(tensors[0])

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
        *,
        inference_params: Any = None,
        loss_mask: Tensor | None = None,
        output_positions: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of each token [b, s] fp32 if `labels` are given, else logits [b, s, v] (or [b, s, v/tp], see
        `parallel_output`); before the last stage the hidden states [s, b, h].

        Args:
            input_ids: [b, s]; None on stages without the embedding.
            position_ids: [b, s]; for mrope [3, b, s].
            attention_mask: bool, True where a key is hidden, broadcasts to [b, a, s, s]; None is causal
                attention.
            decoder_input: [s, b, h] to use instead of the embedding's output.
            labels: [b, s].
            packed_seq_params: documents on the flattened [b, s] token axis that do not see each other.
            inference_context: what came before these tokens; `position_ids` are needed on every stage then.
            extra_block_kwargs: further arguments of the transformer block.
            runtime_gather_output: overrides `parallel_output`.
            loss_mask: [b, s], which tokens count, for the losses of further tokens; the training program weighs the
                next tokens' ones.
            output_positions: [b, s] bool: the positions whose logits are wanted, [1, n, v] in the order of [b, s].
                Where ranks have whole sequences, the others do not go through the output layer. Excludes `labels`.
            padding_mask: [b, s] bool on every stage, True where there is no token: experts learn nothing there about
                their load.
        """
        if decoder_input is None and self.pre_process:
            assert input_ids is not None
            decoder_input = self.embedding(input_ids, position_ids)
        inference_context = inference_context if inference_context is not None else inference_params
        angles = self._angles(decoder_input, position_ids, packed_seq_params, inference_context)
        padding = self._padding_of_rows(padding_mask)
        hidden_states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=angles,
            packed_seq_params=packed_seq_params,
            **padding,
            **(extra_block_kwargs or {}),
        )
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if self.mtp_process and labels is not None and self.training:
            assert input_ids is not None
            hidden_states = self.mtp(
                input_ids,
                position_ids,
                hidden_states,
                attention_mask,
                labels=labels,
                rotary_pos_emb=angles,
                packed_seq_params=packed_seq_params,
                extra_block_kwargs=padding,
                loss_mask=loss_mask,
                embedding=self.embedding,
                output_layer=self.output_layer,
                output_weight=weight,
                compute_language_model_loss=self.compute_language_model_loss,
                loss_of_hidden_states=self.loss_of_hidden_states,
            )
        if labels is not None:
            return self.loss_of_hidden_states(labels, hidden_states, weight, runtime_gather_output)
        selects_early = output_positions is not None and not self.config.sequence_parallel
        if selects_early:
            hidden_states = _at(hidden_states, output_positions)
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
        if output_positions is not None and not selects_early:
            logits = _at(logits, output_positions)
        return logits.transpose(0, 1).contiguous()

    def _padding_of_rows(self, padding_mask: Tensor | None) -> dict[str, Tensor]:
        """An argument of the block: the mask of the rows of hidden states that this rank has; none without a mask."""
        if padding_mask is None:
            return {}
        rows = padding_mask.t()
        if self.config.sequence_parallel:
            group = self.model_comm_pgs.tp
            rows = rows.chunk(get_pg_size(group))[get_pg_rank(group)]
        return {"padding_mask": rows}

    def _angles(
        self,
        decoder_input: Tensor | None,
        position_ids: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        inference_context: BaseInferenceContext | None,
    ) -> Tensor | None:
        """Rotary angles [s, 1, 1, r] of this batch; with a context [s, b, 1, r], by the positions of the tokens."""
        rotary = self.rotary_pos_emb
        if rotary is None:
            return None
        if isinstance(rotary, MultimodalRotaryEmbedding):
            assert position_ids is not None
            if self.config.mrope_section is None:
                raise ValueError("position_embedding_type mrope needs mrope_section")
            return rotary(position_ids, self.config.mrope_section)
        if inference_context is not None:
            assert position_ids is not None
            angles = rotary(inference_context.max_sequence_length, packed_seq=True)
            return (angles[0] if isinstance(angles, tuple) else angles)[position_ids.t(), 0]
        length = rotary.get_rotary_seq_len(None, self.decoder, decoder_input, self.config, packed_seq_params)
        angles = rotary(length, packed_seq=packed_seq_params is not None)
        return angles[0] if isinstance(angles, tuple) else angles

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Where each parameter of this chunk stands in the whole model."""
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


def _at(x: Tensor, positions: Tensor | None) -> Tensor:
    """[n, 1, ...] of `x` [s, b, ...] where `positions` [b, s] hold."""
    return x.transpose(0, 1)[positions].unsqueeze(1)
