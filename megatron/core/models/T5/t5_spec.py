"""What T5 layers are made of."""

from __future__ import annotations

from typing import NoReturn

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import CHECKPOINT_NAMES_OF_NORMS
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.attention_backends import build_core_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def _self_attention(mask_type: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=build_core_attention),
            linear_proj=RowParallelLinear,
        ),
    )


def _mlp() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def encoder_model_with_local_spec() -> ModuleSpec:
    """An encoder layer of torch's own operations: attends to every token that is not padding."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=FusedLayerNorm,
            self_attention=_self_attention(AttnMaskType.padding),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=FusedLayerNorm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(CHECKPOINT_NAMES_OF_NORMS),
        ),
    )


def decoder_model_with_local_spec() -> ModuleSpec:
    """A decoder layer of torch's own operations: causal, then across to the encoder's tokens that are not padding."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=FusedLayerNorm,
            self_attention=_self_attention(AttnMaskType.causal),
            self_attn_bda=get_bias_dropout_add,
            pre_cross_attn_layernorm=FusedLayerNorm,
            cross_attention=ModuleSpec(
                module=CrossAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=CrossAttentionSubmodules(
                    linear_q=ColumnParallelLinear,
                    linear_kv=ColumnParallelLinear,
                    core_attention=ModuleSpec(module=build_core_attention),
                    linear_proj=RowParallelLinear,
                ),
            ),
            cross_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=FusedLayerNorm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(CHECKPOINT_NAMES_OF_NORMS),
        ),
    )


def get_t5_encoder_with_local_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """`num_layers` encoder layers (those of this pipeline stage) and the norm after the last stage's."""
    return TransformerBlockSubmodules([encoder_model_with_local_spec()] * num_layers, FusedLayerNorm)


def get_t5_decoder_with_local_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """`num_layers` decoder layers (those of this pipeline stage) and the norm after the last stage's."""
    return TransformerBlockSubmodules([decoder_model_with_local_spec()] * num_layers, FusedLayerNorm)


def get_t5_encoder_with_transformer_engine_block_spec(num_layers: int) -> NoReturn:
    """Layers of Transformer Engine's modules, which are not built yet.

    Raises:
        NotImplementedError: always.
    """
    _refuse_transformer_engine("get_t5_encoder_with_local_block_spec")


def get_t5_decoder_with_transformer_engine_block_spec(num_layers: int) -> NoReturn:
    """Layers of Transformer Engine's modules, which are not built yet.

    Raises:
        NotImplementedError: always.
    """
    _refuse_transformer_engine("get_t5_decoder_with_local_block_spec")


def _refuse_transformer_engine(instead: str) -> NoReturn:
    raise NotImplementedError(
        f"layers of Transformer Engine are not built yet: use {instead}, which has the same parameters and checkpoint "
        "keys"
    )
