"""One state space layer of a stack. s sequence, b microbatch, h hidden."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import groups_or_default


@dataclass
class MambaLayerSubmodules:
    """Parts of `MambaLayer`; those left out do nothing."""

    norm: ModuleSpec | type = IdentityOp
    mixer: ModuleSpec | type = IdentityOp
    mamba_bda: Any = IdentityOp
    sharded_state_dict_keys_map: dict[str, str] = field(default_factory=dict)
    """Prefixes of parameter names in the module to those in a distributed checkpoint."""


class MambaLayer(MegatronModule, BaseTransformerLayer):
    """x + mixer(norm(x)), [s, b, h]; sequence parallel [s/tp, b, h].

    Args:
        layer_number: 1-based number within this pipeline chunk.
        residual_in_fp32: keep x in fp32 while the norm gives the mixer the parameters' type.
        vp_stage: virtual stage that holds the layer.
    """

    fsdp_unit = True
    """Fully sharded, its weights are gathered together."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int = 1,
        residual_in_fp32: bool = False,
        model_comm_pgs: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        groups = groups_or_default(model_comm_pgs)
        self.submodules_config = submodules
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, groups.pp)
        self.hidden_dropout, self.residual_in_fp32 = config.hidden_dropout, residual_in_fp32
        self.norm = build_module(
            submodules.norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mixer = build_module(
            submodules.mixer,
            config=config,
            d_model=config.hidden_size,
            layer_number=self.layer_number,
            model_comm_pgs=groups,
        )
        self.mamba_bda = build_module(submodules.mamba_bda)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: Any = None,
    ) -> Tensor:
        """Output of the layer; mask and angles are of no use to it."""
        context = inference_context if inference_context is not None else inference_params
        residual = hidden_states.to(torch.float32) if self.residual_in_fp32 else hidden_states
        mixed = self.mixer(self.norm(hidden_states), inference_context=context)
        add = self.mamba_bda(self.training, self.config.bias_dropout_fusion)
        return add(mixed, residual, self.hidden_dropout)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mixer's states before the first token."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

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
