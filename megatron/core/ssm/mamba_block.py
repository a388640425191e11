"""The layers of a hybrid model that one pipeline chunk holds. s sequence, b microbatch, h hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, allocate_layers
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.layer_placement import layers_of_chunk
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import pipeline_rank
from megatron.core.transformer.utils import groups_or_default


@dataclass
class MambaStackSubmodules:
    """Layers that `MambaStack` is made of, by kind."""

    mamba_layer: ModuleSpec | type = IdentityOp
    attention_layer: ModuleSpec | type = IdentityOp
    mlp_layer: ModuleSpec | type = IdentityOp
    moe_layer: ModuleSpec | type = IdentityOp

    def of(self, symbol: str) -> ModuleSpec | type:
        """The layer that a letter of a pattern stands for."""
        return {
            Symbols.MAMBA: self.mamba_layer,
            Symbols.ATTENTION: self.attention_layer,
            Symbols.MLP: self.mlp_layer,
            Symbols.MOE: self.moe_layer,
        }[symbol]


class MambaStack(TransformerBlock):
    """State space, attention and feed-forward layers in the order of a pattern; on the last chunk the final norm.

    hidden_states [s, b, h] -> [s, b, h]; sequence parallel [s/tp, b, h] throughout. Recompute, offloading and all that
    concerns whole layers is that of a transformer block.

    Args:
        submodules: the layers.
        residual_in_fp32: of the state space layers.
        hybrid_attention_ratio, hybrid_mlp_ratio, hybrid_override_pattern: see `allocate_layers`.
        post_layer_norm: end the model with a norm.
        device, dtype: where and in which type to keep the parameters, if not as the configuration says.

    Raises:
        ValueError: ratios or pattern do not fit; a pattern has experts and the configuration none.
    """

    norm_name = "final_norm"

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaStackSubmodules,
        residual_in_fp32: bool = False,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_layer_norm: bool = True,
        post_process: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        pattern = allocate_layers(config.num_layers, hybrid_attention_ratio, hybrid_mlp_ratio, hybrid_override_pattern)
        if (Symbols.MOE in pattern) != (config.num_moe_experts is not None):
            raise ValueError(
                f"the layers {''.join(pattern)!r} have {pattern.count(Symbols.MOE)} mixtures of experts "
                f"({Symbols.MOE}) for num_moe_experts ({config.num_moe_experts}): give both or neither"
            )
        groups = groups_or_default(model_comm_pgs)
        first, count = layers_of_chunk(config, pipeline_rank(groups.pp), vp_stage)
        here = pattern[first : first + count]
        specs: list[Any] = [_with_residual(submodules.of(symbol), residual_in_fp32) for symbol in here]
        super().__init__(
            config,
            TransformerBlockSubmodules(specs, FusedLayerNorm),
            post_layer_norm=post_layer_norm,
            pre_process=pre_process,
            post_process=post_process,
            model_comm_pgs=groups,
            vp_stage=vp_stage,
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        self.layer_type_list = here
        """The symbol of each layer of this chunk."""

    def run_layer(
        self, layer: Any, hidden_states: Tensor, context: Tensor | None, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden_states, context); a state space layer looks at nothing but its input."""
        if isinstance(layer, MambaLayer):
            if others["packed_seq_params"] is not None:
                raise NotImplementedError(
                    "packed sequences: the state of a state space layer runs through all tokens of a sample; give each "
                    "sequence a sample of its own"
                )
            output = self.call_layer(layer, hidden_states, inference_context=others["inference_context"])
            return output, context
        return super().run_layer(layer, hidden_states, context, others)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Number of each state space layer -> its states before the first token."""
        return {
            layer.layer_number: layer.allocate_inference_cache(batch_size, max_seqlen, dtype)
            for layer in self.layers
            if isinstance(layer, MambaLayer)
        }

    def _is_heterogeneous(self, metadata: dict[str, Any] | None) -> bool:
        """Layers keep their numbers in checkpoints, also where all are of one kind."""
        return True


def _with_residual(spec: ModuleSpec | type, residual_in_fp32: bool) -> ModuleSpec | type:
    if isinstance(spec, ModuleSpec) and get_module(spec) is MambaLayer and residual_in_fp32:
        return replace(spec, params={**spec.params, "residual_in_fp32": True})
    return spec
