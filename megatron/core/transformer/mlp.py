"""Feed-forward block, y = W2 act(W1 x) (arXiv:1706.03762, section 3.3), gated: y = W2 (act(Wg x) * Wu x)
(arXiv:2002.05202). s sequence, b microbatch, h hidden, f feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import gelu, silu

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.fusions import compiled
from megatron.core.fusions.compiled import region
from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import gelu_impl, sharded_state_dict_default

Activation = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass
class MLPSubmodules:
    """Parts of `MLP`."""

    linear_fc1: ModuleSpec | type | None = None
    linear_fc2: ModuleSpec | type | None = None


class MLP(MegatronModule):
    """Column-parallel W1, row-parallel W2: one collective on the way in, one on the way out.

    hidden_states [s/tp, b, h] -> all-gather -> fc1 [s, b, f/tp] -> act -> fc2 -> reduce-scatter -> [s/tp, b,
    h]. Without sequence parallelism the input is [s, b, h] and fc2 ends in an all-reduce. A gated fc1 gives
    [gate ; up] of 2f/tp features on each rank.

    Args:
        is_expert: one expert of a mixture: its tokens are communicated by the dispatcher.
        input_size: instead of `config.hidden_size`.
        ffn_hidden_size: instead of `config.ffn_hidden_size`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config)
        h = config.hidden_size if input_size is None else input_size
        f = config.ffn_hidden_size if ffn_hidden_size is None else ffn_hidden_size
        assert f is not None
        self.input_size = h
        # Gate and up are two matrices, each cut over the ranks: the values do not depend on the number of
        # ranks.
        stacked: dict[str, Any] = {"stride": 2} if config.gated_linear_unit else {}
        self.linear_fc1 = build_module(
            submodules.linear_fc1,  # type: ignore[arg-type]
            h,
            2 * f if config.gated_linear_unit else f,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear,
            skip_bias_add=True,
            is_expert=is_expert,
            tp_comm_buffer_name="fc1",
            tp_group=tp_group,
            **stacked,
        )
        self.activation_func = config.activation_func
        self.activate = choose_activation(config)
        self.linear_fc2 = build_module(
            submodules.linear_fc2,  # type: ignore[arg-type]
            f,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=is_expert,
            tp_comm_buffer_name="fc2",
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(output, bias to be added or None).

        Args:
            per_token_scale: factor on the activations of each token, broadcasts to [s, b].
        """
        intermediate, bias = self.linear_fc1(hidden_states)  # [s, b, f/tp], gated [s, b, 2f/tp]
        activated = self.activate(intermediate, bias)  # [s, b, f/tp]
        if per_token_scale is not None:
            activated = (activated * per_token_scale.unsqueeze(-1)).to(activated.dtype)
        return self.linear_fc2(activated)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As of the parts; a gated fc1 is stored as [all gate rows ; all up rows] whatever the number of
        ranks."""
        sharded: ShardedStateDict = {}
        for name, module in self.named_children():
            part = sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
            if self.config.gated_linear_unit and name == "linear_fc1":
                for key in (f"{prefix}{name}.weight", f"{prefix}{name}.bias"):
                    if key in part:
                        part[key] = apply_swiglu_sharded_factory(part[key], sharded_offsets)
            sharded.update(part)
        return sharded


def choose_activation(config: TransformerConfig) -> Activation:
    """The function of (x, bias or None) that stands between the two linear layers.

    With `bias_activation_fusion` gelu is its tanh approximation; without it, `config.activation_func` as it
    is.
    """
    if config.torch_compile:
        function = config.activation_func
        if config.bias_activation_fusion and function is gelu:
            function = gelu_impl
        return region(compiled.activation(function, config.gated_linear_unit))
    if config.bias_activation_fusion:
        fused = {
            (gelu, False): bias_gelu_impl,
            (gelu, True): bias_geglu_impl,
            (silu, True): bias_swiglu_impl,
        }
        found = fused.get((config.activation_func, config.gated_linear_unit))
        if found is not None:
            return found
    return _Unfused(config.activation_func, config.gated_linear_unit)


class _Unfused:
    """act(x + bias), gated: act(first half) * second half; by plain torch operations."""

    def __init__(self, activation_func: Callable[[Tensor], Tensor], gated: bool) -> None:
        self.activation_func, self.gated = activation_func, gated

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            x = x + bias
        if not self.gated:
            return self.activation_func(x)
        gate, up = x.chunk(2, dim=-1)
        return self.activation_func(gate) * up


def apply_swiglu_sharded_factory(
    original_sh_ten: ShardedTensor, sharded_offsets: tuple[tuple[int, int, int], ...]
) -> ShardedTensorFactory:
    """A gated fc1 shard [gate_t ; up_t] of rank t as two boxes of the stored [gate ; up].

    Of tp ranks, gate_t is box t and up_t box tp + t of 2 tp boxes along the first axis. A flattened range of
    the shard (distributed optimizer) becomes the ranges of both halves that it covers.
    """
    axis = len(sharded_offsets)
    boxes = original_sh_ten.axis_fragmentations
    assert boxes is not None
    count = boxes[axis]
    rank = original_sh_ten.global_offset[axis] // original_sh_ten.local_shape[0]
    half_shape = (original_sh_ten.local_shape[0] // 2, *original_sh_ten.local_shape[1:])
    options = {"prepend_axis_num": axis, "allow_shape_mismatch": original_sh_ten.allow_shape_mismatch}

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        numel = torch.Size(half_shape).numel()
        parts = []
        for i, position in enumerate((rank, count + rank)):
            offsets = (*sharded_offsets, (axis, position, 2 * count))
            if flattened_range is None:
                half = data.narrow(0, i * half_shape[0], half_shape[0])
                parts.append(
                    ShardedTensor.from_rank_offsets(key, half, *offsets, replica_id=replica_id, **options)  # type: ignore[arg-type]
                )
                continue
            begin, end = max(flattened_range.start, i * numel), min(flattened_range.stop, (i + 1) * numel)
            if begin < end:
                parts.append(
                    ShardedTensor.from_rank_offsets_flat(
                        key,
                        data[begin - flattened_range.start : end - flattened_range.start],
                        half_shape,
                        *offsets,
                        flattened_range=slice(begin - i * numel, end - i * numel),
                        replica_id=replica_id,
                        **options,
                    )
                )
        return parts

    return ShardedTensorFactory(
        original_sh_ten.key,
        original_sh_ten.data,
        build,  # type: ignore[arg-type]
        torch.cat,  # type: ignore[arg-type]
        original_sh_ten.replica_id,
        flattened_range=original_sh_ten.flattened_range,
    )
