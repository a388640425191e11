"""The experts of this rank, one after the other or as one stack of matrices. E experts in all, E/EP here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.gemm import LinearProducts
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules, choose_activation
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.grouped_linear import grouped_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_depth_rules import recomputes
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import divide, get_pg_rank, get_pg_size, make_replicated_sharded_object

Offsets = tuple[tuple[int, int, int], ...]

_STATE = "._extra_state"
"""Ends the name of the state of a matrix' products."""


class SequentialMLP(MegatronModule):
    """One `MLP` for each expert, one after the other."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        groups = groups_or_default(model_comm_pgs)
        self.num_local_experts = num_local_experts
        self.first_expert = get_pg_rank(groups.ep) * num_local_experts
        self.replica = (0, 0, get_pg_rank(groups.expt_dp))
        self.tp_group = groups.expt_tp
        self.local_experts = nn.ModuleList(
            MLP(
                config,
                submodules,
                is_expert=True,
                ffn_hidden_size=config.moe_ffn_hidden_size,
                tp_group=groups.expt_tp,
            )
            for _ in range(num_local_experts)
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """(rows [m, h], no bias): expert e of its rows, times their weights.

        Args:
            permuted_local_hidden_states: [m, h] in the order of experts.
            tokens_per_expert: rows of each, [E/EP].
            permuted_probs: [m].
        """
        rows, weights = _weighted_input(permuted_local_hidden_states, permuted_probs, self.config)
        splits = tokens_per_expert.tolist()
        outputs = [
            expert(part, part_weights)[0]
            for expert, part, part_weights in zip(self.local_experts, rows.split(splits), weights.split(splits))
        ]
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Each matrix with an axis for the experts, so that no key depends on how they are distributed."""
        sharded: ShardedStateDict = {}
        axis, number = len(sharded_offsets), self.first_expert
        for i, expert in enumerate(self.local_experts):
            offsets = (*sharded_offsets, (axis, number + i, self.config.num_moe_experts or 0))
            local = f"{prefix}local_experts.{i}."
            part = expert.sharded_state_dict(local, offsets, metadata)  # type: ignore[operator]
            for name, described in part.items():
                key = described.key.replace(local, f"{prefix}experts.", 1)
                # What is not cut is held by the tensor parallel ranks too.
                rank = get_pg_rank(self.tp_group) if isinstance(described, ShardedObject) else 0
                sharded[name] = replace(described, key=key, replica_id=(0, rank, self.replica[2]))
        return sharded


class GroupedMLP(MegatronModule):
    """All experts of this rank in two stacks of matrices: `weight1` [E/EP, f/etp, h] (gated [E/EP, 2f/etp, h]: rows of
    gates, then of ups) and `weight2` [E/EP, h, f/etp].

    Same values, same checkpoints as `SequentialMLP`.
    """

    fsdp_unit = True
    """Fully sharded, its weights are gathered together."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, model_comm_pgs: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config)
        groups = groups_or_default(model_comm_pgs)
        self.num_local_experts = num_local_experts
        self.first_expert = get_pg_rank(groups.ep) * num_local_experts
        self.replica = (0, 0, get_pg_rank(groups.expt_dp))
        self.tp_group = groups.expt_tp
        self.activate = choose_activation(config)
        self.recompute_activation = recomputes(config, "moe_act")
        self.halves = 2 if config.gated_linear_unit else 1
        assert config.moe_ffn_hidden_size is not None
        inner, h = divide(config.moe_ffn_hidden_size, get_pg_size(self.tp_group)), config.hidden_size
        self.weight1 = self._stack((self.halves * inner, h), 0, "linear_fc1", config.init_method, self.halves)
        self.weight2 = self._stack((h, inner), 1, "linear_fc2", config.output_layer_init_method)
        self.products: tuple[list[LinearProducts], list[LinearProducts]] | None = None
        """How the two matrices of each expert are multiplied; None for all together, in their own type."""

    def use_products(self, make: Callable[[str, bool], LinearProducts]) -> None:
        """Multiply each matrix by what `make` gives for it."""
        columns, rows = ([make(cut, True) for _ in range(self.num_local_experts)] for cut in ("column", "row"))
        self.products = columns, rows

    def all_products(self) -> list[LinearProducts]:
        """Of all matrices."""
        return [own for stack in self.products or () for own in stack]

    def products_of_weights(self) -> list[tuple[nn.Parameter, list[LinearProducts]]]:
        """Each stack of matrices, and the products of each of them."""
        return list(zip((self.weight1, self.weight2), self.products or ()))

    def _current_products(self) -> tuple[list[LinearProducts] | None, list[LinearProducts] | None]:
        if self.products is None or self.training:
            return self.products or (None, None)
        columns, rows = ([own.for_evaluation() for own in stack] for stack in self.products)
        return columns, rows

    def _stack(self, shape: tuple[int, int], dim: int, name: str, init_method: Any, stride: int = 1) -> nn.Parameter:
        config = self.config
        size = (self.num_local_experts, *shape)
        param = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=parameter_device(config)))
        set_tensor_model_parallel_attributes(param, True, dim + 1, stride)
        param.allreduce = not config.experts_have_own_replicas  # type: ignore[attr-defined]
        numbers = range(self.first_expert, self.first_expert + self.num_local_experts)
        register_parameter_init(
            param,
            init_method,
            partition_dim=dim,
            tp_group=self.tp_group,
            stride=stride,
            perform_initialization=config.perform_initialization,
            stacked=tuple(f"local_experts.{number}.{name}.weight" for number in numbers),
        )
        return param

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """As of `SequentialMLP`."""
        rows, weights = _weighted_input(permuted_local_hidden_states, permuted_probs, self.config)
        splits, fused = tokens_per_expert.tolist(), self.config.gradient_accumulation_fusion
        columns, last = self._current_products()
        hidden = grouped_linear(rows, self.weight1, splits, fused, columns)
        again = CheckpointWithoutOutput() if self.recompute_activation and self.training and len(rows) else None
        inner = (
            self._activated(hidden, weights) if again is None else again.checkpoint(self._activated, hidden, weights)
        )
        output = grouped_linear(inner, self.weight2, splits, fused, last)
        if again is not None:
            again.discard_output_and_register_recompute(output)
        return output, None

    def _activated(self, hidden: Tensor, weights: Tensor) -> Tensor:
        inner = self.activate(hidden, None)
        return (inner * weights.unsqueeze(-1)).to(inner.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As of `SequentialMLP`: a box of the stored tensors for each expert (and for gate and up)."""
        key = f"{prefix}experts.linear_{{}}.weight".format
        return {
            f"{prefix}weight1": self._boxes(key("fc1"), self.weight1, 0, self.halves, sharded_offsets),
            f"{prefix}weight2": self._boxes(key("fc2"), self.weight2, 1, 1, sharded_offsets),
            **self._states(prefix, sharded_offsets),
        }

    def _states(self, prefix: str, sharded_offsets: Offsets) -> ShardedStateDict:
        """Of the products, under the names of `SequentialMLP`."""
        states: ShardedStateDict = {}
        axis, replica = len(sharded_offsets), (0, get_pg_rank(self.tp_group), self.replica[2])
        for name, stack in zip(("fc1", "fc2"), self.products or ()):
            for i, state in enumerate(own.state() for own in stack):
                if state is not None:
                    offsets = (*sharded_offsets, (axis, self.first_expert + i, self.config.num_moe_experts or 0))
                    described = make_replicated_sharded_object(
                        state, f"{prefix}experts.linear_{name}._extra_state", offsets, tp_group=self.tp_group
                    )
                    states[f"{prefix}{name}.{i}{_STATE}"] = replace(described, replica_id=replica)
        return states

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stack in zip(("fc1", "fc2"), self.products or ()):
            for i, state in enumerate(own.state() for own in stack):
                if state is not None:
                    destination[f"{prefix}{name}.{i}{_STATE}"] = state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, stack in zip(("fc1", "fc2"), self.products or ((), ())):
            for i in range(self.num_local_experts):
                state = state_dict.pop(f"{prefix}{name}.{i}{_STATE}", None)
                if isinstance(state, dict) and stack:
                    stack[i].load(state)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _boxes(self, key: str, param: Tensor, dim: int, halves: int, sharded_offsets: Offsets) -> ShardedTensorFactory:
        experts, shape = self.config.num_moe_experts or 0, param.shape[1:]
        box_shape = (shape[0] // halves, shape[1])
        numel = torch.Size(box_shape).numel()
        axis, rank, size = len(sharded_offsets), get_pg_rank(self.tp_group), get_pg_size(self.tp_group)

        def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
            flat = data.reshape(-1)
            held = slice(0, flat.numel()) if flattened_range is None else flattened_range
            parts = []
            for box in range(self.num_local_experts * halves):
                expert, half = divmod(box, halves)
                offsets = (
                    *sharded_offsets,
                    (axis, self.first_expert + expert, experts),
                    (axis + 1 + dim, half * size + rank, halves * size),
                )
                options: dict[str, Any] = {"replica_id": replica_id, "prepend_axis_num": axis + 1}
                begin, end = max(held.start, box * numel), min(held.stop, (box + 1) * numel)
                if begin >= end:
                    continue
                part = flat[begin - held.start : end - held.start]
                if flattened_range is None:
                    parts.append(ShardedTensor.from_rank_offsets(key, part.view(box_shape), *offsets, **options))
                else:
                    range_ = slice(begin - box * numel, end - box * numel)
                    parts.append(
                        ShardedTensor.from_rank_offsets_flat(
                            key, part, box_shape, *offsets, flattened_range=range_, **options
                        )
                    )
            return parts

        def merge(parts: list[Tensor]) -> Tensor:
            merged = torch.cat(parts)
            return merged if merged.dim() == 1 else merged.view(param.shape)

        return ShardedTensorFactory(key, param, build, merge, self.replica)  # type: ignore[arg-type]


def _weighted_input(rows: Tensor, weights: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Rows and weights for the experts; with `moe_apply_probs_on_input` the weights are on the rows already."""
    if not config.moe_apply_probs_on_input:
        return rows, weights
    return (rows * weights.unsqueeze(-1)).to(rows.dtype), torch.ones_like(weights)
