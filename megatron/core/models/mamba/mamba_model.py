"""Language models of Mamba-2 layers (arXiv:2405.21060), alone or among attention and feed-forward layers
(arXiv:2406.07887)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class MambaModel(GPTModel):
    """Embedding, stack of layers, output layer: those of them that this pipeline chunk holds.

    All but the stack is as in `GPTModel`, whose arguments are not explained again. State space layers know the order of
    tokens by themselves; positions are for attention layers.

    Args:
        mamba_stack_spec: of the whole stack, such as `mamba_layer_specs.mamba_stack_spec`.
        hybrid_attention_ratio, hybrid_mlp_ratio, hybrid_override_pattern: which layer is of which kind, see
            `allocate_layers`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mamba_stack_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: Literal["learned_absolute", "rope", "none"] = "none",
        rotary_percent: float = 1.0,
        rotary_base: int = 10000,
        scatter_embedding_sequence_parallel: bool = True,
        seq_len_interpolation_factor: float | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
        *,
        vp_stage: int | None = None,
        true_vocab_size: int | None = None,
    ) -> None:
        layers = {
            "hybrid_attention_ratio": hybrid_attention_ratio,
            "hybrid_mlp_ratio": hybrid_mlp_ratio,
            "hybrid_override_pattern": hybrid_override_pattern,
        }
        super().__init__(
            config,
            replace(mamba_stack_spec, params={**mamba_stack_spec.params, **layers}),
            vocab_size,
            max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=fp16_lm_cross_entropy,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            position_embedding_type=position_embedding_type,
            rotary_percent=rotary_percent,
            rotary_base=rotary_base,
            scatter_embedding_sequence_parallel=scatter_embedding_sequence_parallel,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            vp_stage=vp_stage,
            true_vocab_size=true_vocab_size,
            model_comm_pgs=model_comm_pgs,
        )
