"""One transformer layer: attention and feed-forward block, each between a norm and a return to the residual
stream.

s sequence, b microbatch, h hidden.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.fusions import compiled
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add, get_compiled_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import (
    ProcessGroupCollection,
    default_process_groups,
    has_default_process_groups,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.layer_placement import layers_of_chunk
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_depth_rules import recomputes
from megatron.core.transformer.utils import groups_or_default, of_layer
from megatron.core.utils import get_pg_rank

Part = ModuleSpec | type | Callable[..., Any]


@dataclass
class TransformerLayerSubmodules:
    """Parts of `TransformerLayer`; those left out do nothing."""

    input_layernorm: Part = IdentityOp
    self_attention: Part = IdentityOp
    self_attn_bda: Part = IdentityFuncOp
    pre_cross_attn_layernorm: Part = IdentityOp
    cross_attention: Part = IdentityOp
    cross_attn_bda: Part = IdentityFuncOp
    pre_mlp_layernorm: Part = IdentityOp
    mlp: Part = IdentityOp
    mlp_bda: Part = IdentityFuncOp
    sharded_state_dict_keys_map: dict[str, str] = field(default_factory=dict)
    """Prefixes of parameter names in the module to those in a distributed checkpoint."""


class BaseTransformerLayer(ABC):
    """Marks classes that a `TransformerBlock` stacks."""


def get_transformer_layer_offset(
    config: TransformerConfig, vp_stage: int | None = None, pp_group: ProcessGroup | None = None
) -> int:
    """Number of layers of the model before this rank's virtual stage."""
    return layers_of_chunk(config, pipeline_rank(pp_group), vp_stage).offset


def pipeline_rank(pp_group: ProcessGroup | None = None) -> int:
    """This rank's place in the pipeline group, or in the process-wide one; 0 for a process on its own."""
    if has_default_process_groups() and pp_group in (None, default_process_groups().pp):
        return parallel_state.get_pipeline_model_parallel_rank()  # which tools may set
    return get_pg_rank(pp_group)


class TransformerLayer(MegatronModule, BaseTransformerLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); cross attention between the two where the spec has it.

    hidden_states [s, b, h] -> [s, b, h]; sequence parallel [s/tp, b, h], gathered and scattered inside the
    two halves.

    Args:
        layer_number: 1-based number within this pipeline chunk.
        hidden_dropout: instead of `config.hidden_dropout`.
        vp_stage: virtual stage that holds the layer.
    """

    fsdp_unit = True
    """Fully sharded, its weights are gathered together."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        groups = groups_or_default(model_comm_pgs)
        self.submodules_config = submodules
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, groups.pp)
        self.hidden_dropout = config.hidden_dropout if hidden_dropout is None else hidden_dropout

        self.input_layernorm = self._norm(submodules.input_layernorm)
        self.self_attention = self._attention(submodules.self_attention, groups)
        self.self_attn_bda = self._bias_dropout_add(submodules.self_attn_bda)
        self.pre_cross_attn_layernorm = self._norm(submodules.pre_cross_attn_layernorm)
        self.cross_attention = self._attention(submodules.cross_attention, groups)
        self.cross_attn_bda = self._bias_dropout_add(submodules.cross_attn_bda)
        self.pre_mlp_layernorm = self._norm(submodules.pre_mlp_layernorm)
        self.mlp = self._feed_forward(submodules.mlp, groups)
        self.mlp_bda = self._bias_dropout_add(submodules.mlp_bda)
        self.recompute_norms = recomputes(config, "layernorm")
        self.adds_with_norm = self._can_add_with_norm()
        kind = "moe" if isinstance(self.mlp, BaseMoELayer) else "mlp"
        self.recompute_mlp = recomputes(config, kind) and not isinstance(self.mlp, IdentityOp)

    def _can_add_with_norm(self) -> bool:
        """Whether the sum after self attention and the norm before the feed-forward block are one compiled region."""
        between = (self.pre_cross_attn_layernorm, self.cross_attention, self.cross_attn_bda)
        norm = self.pre_mlp_layernorm
        return (
            self.self_attn_bda is get_compiled_bias_dropout_add
            and all(isinstance(part, (IdentityOp, IdentityFuncOp)) for part in between)
            and isinstance(norm, FusedLayerNorm)
            and norm.adds
            and not self.recompute_norms
        )

    def _norm(self, spec: Part) -> nn.Module:
        config = self.config
        return build_module(spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def _bias_dropout_add(self, spec: Part) -> Any:
        if self.config.torch_compile and spec is get_bias_dropout_add and compiled.compiles(compiled.bias_dropout_add):
            return get_compiled_bias_dropout_add
        return build_module(spec)

    def _feed_forward(self, spec: Part, groups: ProcessGroupCollection) -> nn.Module:
        module = get_module(spec)
        more: dict[str, Any] = {}
        if module is MLP:
            more = {"tp_group": groups.tp}
        elif isinstance(module, type) and issubclass(module, BaseMoELayer):
            more = {"layer_number": self.layer_number, "model_comm_pgs": groups}
        return build_module(spec, config=self.config, **more)

    def _attention(self, spec: Part, groups: ProcessGroupCollection) -> nn.Module:
        cp_comm_type = self.config.cp_comm_type
        if isinstance(cp_comm_type, list):
            cp_comm_type = of_layer(cp_comm_type, self.layer_number)
        return build_module(
            spec,
            config=self.config,
            layer_number=self.layer_number,
            cp_comm_type=cp_comm_type,
            model_comm_pgs=groups,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
        *,
        inference_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden_states, context): the layer's output, and what cross attention looks at, unchanged.

        Args:
            hidden_states: [s, b, h].
            attention_mask: True where self attention may not look, broadcasts to [b, a, s, s].
            context: [s', b, h] for cross attention.
            context_mask: True where cross attention may not look.
            rotary_pos_emb: angles of the positions.
            attention_bias: added to the attention scores.
            packed_seq_params: sequences on the token axis that do not see each other.
            padding_mask: [s, b] of these hidden states, True where there is no token, for a mixture of experts.
        """
        inference_context = inference_context if inference_context is not None else inference_params
        residual, normed, norm = self._enter(hidden_states, self.input_layernorm)
        attended = self.self_attention(
            normed,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
        )
        if self.adds_with_norm:
            x, bias = attended
            added = (bias, residual, self.hidden_dropout, self.training)
            hidden_states, normed = self.pre_mlp_layernorm(x, added)
            residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        else:
            hidden_states = self._leave(self.self_attn_bda, attended, residual, norm)

            residual, normed, norm = self._enter(hidden_states, self.pre_cross_attn_layernorm)
            attended = self.cross_attention(
                normed, attention_mask=context_mask, key_value_states=context, inference_context=inference_context
            )
            if isinstance(attended, dict) and "context" in attended:
                context = attended["context"]
            hidden_states = self._leave(self.cross_attn_bda, attended, residual, norm)

            residual, normed, norm = self._enter(hidden_states, self.pre_mlp_layernorm)
        mlp: Callable[[Tensor], Any] = self.mlp
        if padding_mask is not None and isinstance(self.mlp, BaseMoELayer):
            mlp = partial(self.mlp, padding_mask=padding_mask)
        output = checkpoint(mlp, False, normed) if self.recompute_mlp and self.training else mlp(normed)
        return self._leave(self.mlp_bda, output, residual, norm), context

    def _enter(self, hidden_states: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, CheckpointWithoutOutput | None]:
        """(residual, normed input, what can drop it again) of one half."""
        again: CheckpointWithoutOutput | None = None
        if self.recompute_norms and self.training and not isinstance(norm, IdentityOp):
            again = CheckpointWithoutOutput()
            normed = again.checkpoint(norm, hidden_states)
        else:
            normed = norm(hidden_states)
        residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        return residual, normed, again

    def _leave(
        self, bias_dropout_add: Any, output_with_bias: Any, residual: Tensor, norm: CheckpointWithoutOutput | None
    ) -> Tensor:
        """Residual + dropout(output + bias); the normed input has been used then."""
        add = bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        hidden_states = add(output_with_bias, residual, self.hidden_dropout)
        if norm is not None:
            norm.discard_output_and_register_recompute(output_with_bias[0])
        return hidden_states

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As of the parts, under the names that the spec maps them to."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        names = self.submodules_config.sharded_state_dict_keys_map
        apply_prefix_mapping(sharded, {f"{prefix}{old}": f"{prefix}{new}" for old, new in names.items()})
        return sharded
