"""What GPT layers are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.stage_placement import placement_of
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.attention_backends import build_core_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
    pipeline_rank,
)

CHECKPOINT_NAMES_OF_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""A distributed checkpoint names a norm after the linear layer that follows it."""
CHECKPOINT_NAMES_BEFORE_EXPERTS = {"input_layernorm.": CHECKPOINT_NAMES_OF_NORMS["input_layernorm."]}
"""No single linear layer follows the norm before experts, which keeps its name."""
CHECKPOINT_NAMES_OF_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""Nor the norm before latent attention, whose own norms each go with an up projection."""


def get_gpt_layer_local_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    qk_layernorm: bool | None = False,
    multi_latent_attention: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
    normalization: str | None = None,
    qk_l2_norm: bool | None = False,
    use_kitchen: bool = False,
) -> ModuleSpec:
    """A layer of torch's own operations: works on every device. `config.attention_backend` chooses the core.

    Args:
        num_experts: a mixture of so many experts instead of the dense feed-forward block.
        moe_grouped_gemm: with the experts of a rank as stacks of matrices.
        qk_layernorm: normalise queries and keys of each head.
        qk_l2_norm: the same without parameters.
        multi_latent_attention: keys and values through a latent; `qk_layernorm` is for the latents then.
        normalization: kept for the public interface; `config.normalization` decides.

    Raises:
        NotImplementedError: kitchen is asked for.
        ValueError: latent attention with `qk_l2_norm`.
    """
    _refuse_unbuilt(use_kitchen=use_kitchen)
    names = dict(CHECKPOINT_NAMES_OF_NORMS if num_experts is None else CHECKPOINT_NAMES_BEFORE_EXPERTS)
    if multi_latent_attention:
        if qk_l2_norm:
            raise ValueError("latent attention has no norm of heads: leave qk_l2_norm out")
        names.pop("input_layernorm.")
        names |= CHECKPOINT_NAMES_OF_LATENT_NORMS
    head_norm = L2Norm if qk_l2_norm else FusedLayerNorm if qk_layernorm else IdentityOp
    attention = _latent_attention(head_norm) if multi_latent_attention else _attention(head_norm)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=FusedLayerNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=FusedLayerNorm,
            mlp=_get_mlp_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=moe_grouped_gemm),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _attention(head_norm: Any) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=build_core_attention),
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _latent_attention(latent_norm: Any) -> ModuleSpec:
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=ModuleSpec(module=build_core_attention),
            linear_proj=RowParallelLinear,
            q_layernorm=latent_norm,
            kv_layernorm=latent_norm,
        ),
    )


def get_gpt_layer_with_transformer_engine_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    qk_layernorm: bool | None = False,
    multi_latent_attention: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
    qk_l2_norm: bool | None = False,
    use_te_op_fuser: bool | None = False,
    use_kitchen: bool = False,
) -> ModuleSpec:
    """A layer of Transformer Engine's modules.

    Raises:
        NotImplementedError: always, they are not built yet.
    """
    raise NotImplementedError(
        "layers of Transformer Engine are not built yet: use get_gpt_layer_local_spec "
        "(--transformer-impl local), which has the same parameters and checkpoint keys"
    )


def get_gpt_decoder_block_spec(
    config: TransformerConfig,
    use_transformer_engine: bool,
    normalization: str | None = None,
    qk_l2_norm: bool | None = False,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this rank's virtual stage and the final norm, for models whose layers may differ."""
    kinds = kinds_of_layers(config, use_transformer_engine, qk_l2_norm)
    first = get_transformer_layer_offset(config, vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules([kinds[has_experts(config, number)] for number in numbers], FusedLayerNorm)


def kinds_of_layers(
    config: TransformerConfig, use_transformer_engine: bool, qk_l2_norm: bool | None = False
) -> dict[bool, ModuleSpec]:
    """Layers without (False) and, where the configuration has some, with experts (True)."""
    make = get_gpt_layer_with_transformer_engine_spec if use_transformer_engine else get_gpt_layer_local_spec
    make_layer = partial(
        make,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        fp8=config.fp8,
        qk_l2_norm=qk_l2_norm,
        use_kitchen=config.use_kitchen,
    )
    kinds = {False: make_layer()}
    if config.num_moe_experts is not None:
        kinds[True] = make_layer(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    return kinds


def get_gpt_mtp_block_spec(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules | ModuleSpec,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """The `mtp_num_layers` modules that predict further tokens, each with a layer like the model's last one; None
    without, and on stages before the last.

    Args:
        spec: of one layer for all, or of this stage's part of the decoder.
    """
    placement = placement_of(config)
    if not config.mtp_num_layers or placement.stage_of(pipeline_rank(), vp_stage or 0) != placement.num_stages - 1:
        return None
    if isinstance(spec, TransformerBlockSubmodules):  # which has no layer on a stage of its own for the loss
        last = has_experts(config, config.num_layers - 1)
        spec = spec.layer_specs[-1] if spec.layer_specs else kinds_of_layers(config, use_transformer_engine)[last]
    module = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=FusedLayerNorm,
            hnorm=FusedLayerNorm,
            eh_proj=ColumnParallelLinear,
            transformer_layer=spec,
            layer_norm=FusedLayerNorm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules([module] * config.mtp_num_layers)


def has_experts(config: TransformerConfig, layer: int) -> bool:
    """Whether layer `layer` (from 0) is a mixture of experts: every n-th from the first, or those with 1 in a list."""
    if config.num_moe_experts is None:
        return False
    freq = config.moe_layer_freq
    return layer % freq == 0 if isinstance(freq, int) else bool(freq[layer])


def _get_mlp_module_spec(
    use_te: bool | None = True,
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
) -> ModuleSpec:
    """The dense feed-forward block, or experts."""
    _refuse_unbuilt(use_te=use_te)
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if num_experts is None:
        return ModuleSpec(module=MLP, submodules=parts)
    experts: Any = GroupedMLP if moe_grouped_gemm else ModuleSpec(module=SequentialMLP, submodules=parts)
    shared = ModuleSpec(module=SharedExpertMLP, params={"gate": False}, submodules=parts)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))


def _refuse_unbuilt(**wanted: object) -> None:
    given = [f"{name}={value!r}" for name, value in wanted.items() if value]
    if given:
        raise NotImplementedError(f"GPT layers with {', '.join(given)} are not built yet")
