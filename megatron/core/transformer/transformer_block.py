"""The stack of transformer layers that one pipeline chunk holds. s sequence, b microbatch, h hidden."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fp8.attach import compute_in_fp8
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.activation_offload import ActivationOffload
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.layer_placement import layers_of_chunk
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    get_transformer_layer_offset,
    pipeline_rank,
)
from megatron.core.transformer.utils import draws_for_tokens, groups_or_default, sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor


@dataclass
class TransformerBlockSubmodules:
    """Parts of `TransformerBlock`."""

    layer_specs: list[ModuleSpec] | None = None
    """The layers of this pipeline chunk, in order."""
    layer_norm: ModuleSpec | type | None = None
    """The norm after the last layer of the model; None for none."""


def get_num_layers_to_build(
    config: TransformerConfig, vp_stage: int | None = None, pp_group: ProcessGroup | None = None
) -> int:
    """Number of transformer layers that this rank's virtual stage holds."""
    return layers_of_chunk(config, pipeline_rank(pp_group), vp_stage).num_layers


def block_submodules(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules | ModuleSpec,
    vp_stage: int | None = None,
    pp_group: ProcessGroup | None = None,
) -> TransformerBlockSubmodules:
    """The parts that a spec of a block, or of one layer for all, stands for.

    Raises:
        TypeError: the spec is of something else.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    module = get_module(spec)
    if isinstance(module, type) and issubclass(module, TransformerBlock):
        return spec.submodules
    if isinstance(module, type) and issubclass(module, BaseTransformerLayer):
        return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config, vp_stage, pp_group), FusedLayerNorm)
    raise TypeError(f"a TransformerBlock is made of transformer layers, the spec is of {module!r}")


def build_block(config: TransformerConfig, spec: TransformerBlockSubmodules | ModuleSpec, **kwargs: Any) -> Any:
    """The block that a spec names, a `TransformerBlock` if it names a layer or parts only; further arguments as of
    `TransformerBlock`."""
    module = get_module(spec) if isinstance(spec, ModuleSpec) else None
    if isinstance(module, type) and issubclass(module, TransformerBlock) and module is not TransformerBlock:
        return build_module(spec, config=config, **kwargs)  # type: ignore[arg-type]
    return TransformerBlock(config, spec, **kwargs)


class TransformerBlock(MegatronModule):
    """Layers of one pipeline chunk, then, on the last chunk, the final norm.

    hidden_states [s, b, h] -> [s, b, h]; sequence parallel [s/tp, b, h] throughout.

    Args:
        spec: parts of the block, or one layer spec for all its layers.
        post_layer_norm: end the model with a norm.
        pre_process: this is the first chunk; otherwise the input is what `set_input_tensor` was given.
        post_process: this is the last chunk.
        vp_stage: virtual stage, None without interleaving.
    """

    norm_name = "final_layernorm"
    """Under which the norm after the last layer is kept."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules | ModuleSpec,
        post_layer_norm: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        model_comm_pgs: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.model_comm_pgs = groups_or_default(model_comm_pgs)
        self.submodules = block_submodules(config, spec, vp_stage, self.model_comm_pgs.pp)
        self.post_layer_norm = post_layer_norm
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.input_tensor: Tensor | None = None
        self.layers = nn.ModuleList(
            build_module(
                layer_spec,
                config=config,
                layer_number=number,
                model_comm_pgs=self.model_comm_pgs,
                vp_stage=vp_stage,
            )
            for number, layer_spec in enumerate(self.submodules.layer_specs or (), start=1)
        )
        self.num_layers_per_pipeline_rank = len(self.layers)
        for layer in self.layers:
            number: Any = getattr(layer, "layer_number", None)
            compute_in_fp8(layer, config, number, self.model_comm_pgs)
        self.offload = ActivationOffload(config)
        self.graphs = CudaGraphManager(config) if config.enable_cuda_graph else None
        norm: nn.Module | None = None
        if post_process and post_layer_norm and self.submodules.layer_norm is not None:
            norm = build_module(
                self.submodules.layer_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
        setattr(self, self.norm_name, norm)

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """The activations of the previous stage, which `forward` takes instead of its argument."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
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
    ) -> Tensor:
        """Output of the last layer of the chunk, [s, b, h]; arguments as of `TransformerLayer.forward`."""
        if not self.pre_process:
            hidden_states = self.input_tensor
        assert hidden_states is not None
        # A pipeline stage frees its output's memory after sending it, which a view would keep alive.
        hidden_states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        same_for_all_layers = {
            "attention_mask": attention_mask,
            "context_mask": context_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "rotary_pos_cos": rotary_pos_cos,
            "rotary_pos_sin": rotary_pos_sin,
            "attention_bias": attention_bias,
            "inference_context": inference_context if inference_context is not None else inference_params,
            "packed_seq_params": packed_seq_params,
            "sequence_len_offset": sequence_len_offset,
            **({} if padding_mask is None else {"padding_mask": padding_mask}),
        }
        with self._dropout_rng():
            first_stored = 0
            if self.config.recompute_granularity == "full" and self.training:
                hidden_states, context, first_stored = self._run_recomputed(hidden_states, context, same_for_all_layers)
            hidden_states, context = self._run(
                first_stored, len(self.layers), hidden_states, context, same_for_all_layers
            )
        norm = getattr(self, self.norm_name)
        if norm is not None:
            hidden_states = norm(hidden_states)
            hidden_states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        return hidden_states

    def _dropout_rng(self) -> AbstractContextManager[None]:
        """Under sequence parallelism every rank has other tokens, and draws from a stream of its own for them."""
        draws = self.training and draws_for_tokens(self.config)
        return get_cuda_rng_tracker().fork() if self.config.sequence_parallel and draws else contextlib.nullcontext()

    def _run(
        self, start: int, stop: int, hidden_states: Tensor, context: Tensor | None, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Layers start, ..., stop - 1 of this chunk."""
        forward_pass = self.offload.forward_pass((*others.values(), context))
        for i, layer in enumerate(self.layers[start:stop], start):
            with forward_pass.layer(i, layer):
                hidden_states, context = self.run_layer(layer, hidden_states, context, others)
        return hidden_states, context

    def run_layer(
        self, layer: Any, hidden_states: Tensor, context: Tensor | None, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden_states, context) after one layer; `others` are what all layers are handed."""
        return self.call_layer(layer, hidden_states, context=context, **others)

    def call_layer(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """`layer(*args, **kwargs)`, captured where layers run as CUDA graphs."""
        return layer(*args, **kwargs) if self.graphs is None else self.graphs(layer, args, kwargs)

    def _run_recomputed(
        self, hidden_states: Tensor, context: Tensor | None, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, int]:
        """(hidden_states, context, layers done) after the layers whose activations backward will compute
        again.

        uniform: all layers, in pieces of `recompute_num_layers` of which only the input is stored.
        block: the first `recompute_num_layers` layers, each for itself.
        """
        num = self.config.recompute_num_layers
        assert num is not None
        uniform = self.config.recompute_method == "uniform"
        total = len(self.layers) if uniform else min(num, len(self.layers))
        bias = others["attention_bias"]
        for start in range(0, total, num if uniform else 1):
            stop = min(start + num, total) if uniform else start + 1

            # The bias is an argument because it may have gradients, as those of relative positions.
            def run(
                hidden: Tensor, context: Tensor | None, bias: Tensor | None, start: int = start, stop: int = stop
            ) -> Any:
                return self._run(start, stop, hidden, context, others | {"attention_bias": bias})

            tp_group = self.model_comm_pgs.tp
            distribute = (tp_group or True) if self.config.distribute_saved_activations else False
            hidden_states, context = checkpoint(run, distribute, hidden_states, context, bias)
        return hidden_states, context, total

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Layers under their number in the whole model; equal layers stacked along a new first axis of
        num_layers.

        Layers that differ in structure, or `metadata["non_homogeneous_layers"]`, keep the number in the key
        instead.

        Raises:
            ValueError: `sharded_offsets` is not empty.
        """
        if sharded_offsets:
            raise ValueError(f"a TransformerBlock cannot be stacked along further axes {sharded_offsets}")
        offset = get_transformer_layer_offset(self.config, self.vp_stage, self.model_comm_pgs.pp)
        stack = not self._is_heterogeneous(metadata)
        sharded: ShardedStateDict = {}
        for i, layer in enumerate(self.layers):
            local, number = f"{prefix}layers.{i}.", offset + i
            axis = ((0, number, self.config.num_layers),) if stack else ()
            part = layer.sharded_state_dict(local, axis, metadata)  # type: ignore[operator]
            replace_prefix_for_sharding(part, local, f"{prefix}layers." if stack else f"{prefix}layers.{number}.")
            sharded.update(part)
        for name, module in self.named_children():
            if module is not self.layers:
                sharded.update(sharded_state_dict_default(module, f"{prefix}{name}.", (), metadata))
        return sharded

    def _is_heterogeneous(self, metadata: dict[str, Any] | None) -> bool:
        config = self.config
        mixed_experts = isinstance(config.moe_layer_freq, list) or config.moe_layer_freq > 1
        return (
            bool((metadata or {}).get("non_homogeneous_layers"))
            or (config.num_moe_experts is not None and mixed_experts)
            or config.heterogeneous_block_specs
            or config.hetereogenous_dist_checkpoint
        )
