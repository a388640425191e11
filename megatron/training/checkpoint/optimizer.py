"""One kind of optimizer continues from the state of another: sharded or not, with fp32 copies of the weights
or without.

All kinds store their tensors under the same global names. They differ in which they have (an fp32 model has
no copies), and in the dictionaries around them:

- distributed: {optimizer: {param_groups with the step}, grad_scaler?, param_state, param_state_sharding_type}
- mixed precision: {optimizer: {state with common_step, param_groups}, grad_scaler?, fp32_from_fp16_params}
- fp32: {state with common_step, param_groups}
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.collective import gather_from_all
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    restore_lists,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.catalog import Catalog

MODEL_SPACE = "fully_sharded_model_space"
_MAIN_PARAM = re.compile(r"optimizer\.state\.fp32_param\.(.+)")


def kind_of_optimizer(state: Any) -> str:
    """Which of the three kinds a state dict, loaded or to be loaded, belongs to; that of the first of
    several."""
    if 0 in state:
        return kind_of_optimizer(state[0])
    if "param_state" in state or "param_state_sharding_type" in state:
        return "distributed"
    return "mixed precision" if "optimizer" in state else "fp32"


class OptimizerRequest:
    """What an optimizer asks of a checkpoint that an optimizer of any kind has written.

    Args:
        sharded: the optimizer's sharded state dict, whose tensors are to be filled.
        stored: names of the tensors in the checkpoint.
    """

    def __init__(self, sharded: dict[str, Any], stored: Collection[str]) -> None:
        if 0 in sharded:
            raise NotImplementedError(
                "several optimizers (dense and expert weights) cannot yet continue from the state of another kind: "
                "keep --use-distributed-optimizer and the precision as they were, or set --no-load-optim"
            )
        self.sharded = sharded
        self.from_model, self.request = extract_matching_values(
            sharded, lambda value: _main_param_missing(value, stored), return_lists_as_dicts=True
        )
        self.from_model = dict_list_map_outplace(_read_from_model, self.from_model)

    def finish(self, loaded: dict[str, Any], directory: Path) -> dict[str, Any]:
        """The state to give to the optimizer. All ranks call this.

        fp32 copies of weights that the checkpoint lacks are read from the weights themselves.

        Args:
            loaded: what was loaded for `request`, with the checkpoint's own dictionaries around it.
            directory: the checkpoint.
        """
        dist_checkpointing.load(self.from_model, directory, validate_access_integrity=False)
        merge(loaded, dict_list_map_outplace(lambda shard: shard.data, self.from_model))
        return arrange_like(self.sharded, restore_lists(loaded, self.sharded))


def _main_param_missing(value: Any, stored: Collection[str]) -> bool:
    if not isinstance(value, (ShardedTensor, ShardedTensorFactory)) or value.key in stored:
        return False
    name = _MAIN_PARAM.fullmatch(value.key)
    return name is not None and name[1] in stored


def _read_from_model(shard: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
    name = _MAIN_PARAM.fullmatch(shard.key)
    assert name is not None
    return replace(shard, key=name[1])


def full_precision_request(model_request: dict[str, Any], stored: Catalog) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights of an fp32 model that a half-precision run saved as fp32 copies, under the copies' names; the
    rest).

    Args:
        model_request: description of the model's parameters.
        stored: the checkpoint's table of contents.
    """

    def has_fp32_copy(value: Any) -> bool:
        if not isinstance(value, (ShardedTensor, ShardedTensorFactory)) or value.data is None:
            return False
        weight = stored.tensors.get(value.key)
        rounded = weight is not None and weight.dtype != torch.float32
        copy = f"optimizer.state.fp32_param.{value.key}" in stored
        return value.data.dtype == torch.float32 and rounded and copy

    precise, rest = extract_matching_values(model_request, has_fp32_copy, return_lists_as_dicts=True)
    renamed = dict_list_map_outplace(
        lambda shard: replace(shard, key=f"optimizer.state.fp32_param.{shard.key}"), precise
    )
    return renamed, rest


def load_full_precision(precise: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What the first part of `full_precision_request` asks for. All ranks call this; it communicates."""
    if not any(gather_from_all(bool(precise))):
        return {}
    loaded = dist_checkpointing.load(precise, directory, validate_access_integrity=False)
    assert isinstance(loaded, dict)
    return _part_of(loaded, precise)


def _part_of(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    return {key: _part_of(tree[key], v) if isinstance(v, dict) else tree[key] for key, v in like.items()}


def arrange_like(wanted: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Loaded state in the dictionaries of the kind of optimizer that `wanted` comes from.

    Args:
        wanted: a sharded state dict of that optimizer.
        loaded: its tensors where `wanted` has them, and groups, step and scale where the writing optimizer
            had them.
    """
    inner = loaded.get("optimizer", loaded)
    state = inner.get("state", {})
    groups = inner["param_groups"] if "param_groups" in inner else loaded["param_groups"]
    step = state.get("common_step", loaded.get("state", {}).get("common_step", groups[0].get("step")))
    scale = {"grad_scaler": loaded["grad_scaler"]} if "grad_scaler" in loaded else {}
    if "param_state" in wanted:
        counter = {} if step is None else {"step": step}
        return {
            "optimizer": {"param_groups": [{**group, **counter} for group in groups]},
            **scale,
            "param_state": loaded["param_state"],
            "param_state_sharding_type": MODEL_SPACE,
        }
    moments = state if "optimizer" in wanted else loaded.get("state", {})
    plain = {
        "state": {**moments, **({} if step is None else {"common_step": step})},
        "param_groups": [{k: v for k, v in group.items() if k != "step"} for group in groups],
    }
    if "optimizer" in wanted:
        return {"optimizer": plain, **scale, "fp32_from_fp16_params": loaded["fp32_from_fp16_params"]}
    return plain
