"""What a hybrid stack is made of: `--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

CHECKPOINT_NAME_OF_NORM = {"norm.": "mixer.in_proj.layer_norm_"}
"""A distributed checkpoint names a norm after the linear layer that follows it."""


def _parts_of(config: TransformerConfig, num_experts: int | None) -> TransformerLayerSubmodules:
    """Of the GPT layer that the configuration describes."""
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=False,
        multi_latent_attention=config.multi_latent_attention,
    )
    parts: TransformerLayerSubmodules = spec.submodules
    return parts


def _attention_layer(config: TransformerConfig, **kwargs: Any) -> Any:
    parts, nothing = _parts_of(config, None), TransformerLayerSubmodules()
    parts = replace(parts, pre_mlp_layernorm=nothing.pre_mlp_layernorm, mlp=nothing.mlp, mlp_bda=nothing.mlp_bda)
    return build_module(ModuleSpec(TransformerLayer, submodules=parts), config=config, **kwargs)


def _feed_forward_layer(config: TransformerConfig, has_experts: bool = False, **kwargs: Any) -> Any:
    parts, nothing = _parts_of(config, config.num_moe_experts if has_experts else None), TransformerLayerSubmodules()
    parts = replace(
        parts,
        input_layernorm=nothing.input_layernorm,
        self_attention=nothing.self_attention,
        self_attn_bda=nothing.self_attn_bda,
    )
    return build_module(ModuleSpec(MLPLayer, submodules=parts), config=config, **kwargs)


mamba_stack_spec = ModuleSpec(
    module=MambaStack,
    submodules=MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=FusedLayerNorm,
                mixer=ModuleSpec(
                    module=MambaMixer,
                    submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                ),
                mamba_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=CHECKPOINT_NAME_OF_NORM,
            ),
        ),
        attention_layer=ModuleSpec(module=_attention_layer),
        mlp_layer=ModuleSpec(module=_feed_forward_layer),
        moe_layer=ModuleSpec(module=_feed_forward_layer, params={"has_experts": True}),
    ),
)
"""Layers of torch's own operations: works on every device."""
