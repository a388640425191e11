"""One kind of optimizer continues from the state of another: sharded or not, with fp32 copies of the weights
or without, one for all weights or one for dense weights and one for experts.

All kinds store their tensors under the same global names, with `chained_<i>.` before those of the i-th of several
optimizers. They differ in which they have (an fp32 model has no copies), and in the dictionaries around them:

- distributed: {optimizer: {param_groups with the step}, grad_scaler?, param_state, param_state_sharding_type}
- mixed precision: {optimizer: {state with common_step, param_groups}, grad_scaler?, fp32_from_fp16_params}
- fp32: {state with common_step, param_groups}
- several: {number: one of these}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
from megatron.core.optimizer.param_groups import group_identity

MODEL_SPACE = "fully_sharded_model_space"
_CHAINED = re.compile(r"chained_\d+\.")
Names = Mapping[str, str]
"""Name of a tensor without that of its optimizer -> its name in a checkpoint."""
_MAIN_PARAM = re.compile(r"optimizer\.state\.fp32_param\.(.+)")


def kind_of_optimizer(state: Any) -> str:
    """Which of the three kinds a state dict, loaded or to be loaded, belongs to; that of the first of
    several."""
    first = _states(state)[0]
    if "param_state" in first or "param_state_sharding_type" in first:
        return "distributed"
    return "mixed precision" if "optimizer" in first else "fp32"


def needs_conversion(saved: Any, wanted: Any) -> bool:
    """Whether the optimizers that wrote one state dict are others than those that will read the other."""
    return kind_of_optimizer(saved) != kind_of_optimizer(wanted) or len(_states(saved)) != len(_states(wanted))


def _states(state: Any) -> list[Any]:
    """One for each optimizer."""
    return [state[i] for i in sorted(key for key in state if isinstance(key, int))] if 0 in state else [state]


class OptimizerRequest:
    """What an optimizer asks of a checkpoint that optimizers of any kind and number have written.

    Args:
        sharded: the optimizer's sharded state dict, whose tensors are to be filled.
        saved: what the checkpoint has of its optimizers beside tensors.
        stored: what the checkpoint has, by `plain_names`.
    """

    def __init__(self, sharded: dict[str, Any], saved: dict[Any, Any], stored: Names) -> None:
        self.sharded = sharded
        self.written = Written.of(_states(saved))
        renamed = dict_list_map_outplace(lambda value: _as_stored(value, stored), sharded)
        self.from_model, self.request = extract_matching_values(
            renamed, lambda value: _main_param_missing(value, stored), return_lists_as_dicts=True
        )
        self.from_model = dict_list_map_outplace(_read_from_model, self.from_model)

    def finish(self, loaded: dict[Any, Any], directory: Path) -> dict[Any, Any]:
        """The state to give to the optimizer. All ranks call this.

        fp32 copies of weights that the checkpoint lacks are read from the weights themselves.

        Args:
            loaded: what was loaded for `request`, with the checkpoint's own dictionaries around it.
            directory: the checkpoint.
        """
        dist_checkpointing.load(self.from_model, directory, validate_access_integrity=False)
        merge(loaded, dict_list_map_outplace(lambda shard: shard.data, self.from_model))
        if 0 not in self.sharded:
            return arrange_like(self.sharded, restore_lists(loaded, self.sharded), self.written)
        return {
            i: arrange_like(wanted, restore_lists(loaded.get(i, {}), wanted), self.written)
            for i, wanted in enumerate(_states(self.sharded))
        }


@dataclass(frozen=True)
class Written:
    """What a checkpoint says of its optimizers beside their tensors."""

    groups: list[dict[str, Any]]
    step: Any
    scale: dict[str, Any]

    @classmethod
    def of(cls, states: list[Any]) -> Written:
        inner = [state.get("optimizer", state) for state in states]
        groups = [group for state in inner for group in state["param_groups"]]
        steps = [state.get("state", {}).get("common_step") for state in inner]
        steps += [group.get("step") for group in groups]
        step = next((step for step in steps if step is not None), None)
        scale = {"grad_scaler": states[0]["grad_scaler"]} if "grad_scaler" in states[0] else {}
        return cls(_for_either_replicas(groups), step, scale)


def _for_either_replicas(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a copy for experts that have replicas of their own in one of the two runs only, where there is none."""
    known = {group_identity(group) for group in groups}
    copies = [{**group, "is_expert_parallel": not group.get("is_expert_parallel", False)} for group in groups]
    return [*groups, *(copy for copy in copies if group_identity(copy) not in known)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (ShardedTensor, ShardedTensorFactory))


def plain_names(stored: Iterable[str]) -> Names:
    """Of all that a checkpoint has, whether one optimizer wrote it or several."""
    return {_plain(name): name for name in stored}


def _plain(name: str) -> str:
    chained = _CHAINED.match(name)
    return name[chained.end() :] if chained else name


def _as_stored(value: Any, stored: Names) -> Any:
    """A request for a tensor by the name that it has in the checkpoint, whichever optimizer's it was."""
    if not _is_tensor(value):
        return value
    plain = _plain(value.key)
    return replace(value, key=stored.get(plain, plain))


def _main_param_missing(value: Any, stored: Names) -> bool:
    """Of a request `_as_stored`."""
    name = _MAIN_PARAM.fullmatch(value.key) if _is_tensor(value) else None
    return name is not None and value.key not in stored and name[1] in stored


def _read_from_model(shard: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
    name = _MAIN_PARAM.fullmatch(shard.key)
    assert name is not None
    return replace(shard, key=name[1])


def full_precision_request(
    model_request: dict[str, Any], stored: Catalog, names: Names
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights of an fp32 model that a half-precision run saved as fp32 copies, under the copies' names; the
    rest).

    Args:
        model_request: description of the model's parameters.
        stored: the checkpoint's table of contents.
        names: its `plain_names`.
    """

    def has_fp32_copy(value: Any) -> bool:
        if not _is_tensor(value) or value.data is None:
            return False
        weight = stored.tensors.get(value.key)
        rounded = weight is not None and weight.dtype != torch.float32
        return value.data.dtype == torch.float32 and rounded and copy_of(value) in names

    def copy_of(shard: ShardedTensor | ShardedTensorFactory) -> str:
        return f"optimizer.state.fp32_param.{shard.key}"

    precise, rest = extract_matching_values(model_request, has_fp32_copy, return_lists_as_dicts=True)
    return dict_list_map_outplace(lambda shard: replace(shard, key=names[copy_of(shard)]), precise), rest


def load_full_precision(precise: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What the first part of `full_precision_request` asks for. All ranks call this; it communicates."""
    if not any(gather_from_all(bool(precise))):
        return {}
    loaded = dist_checkpointing.load(precise, directory, validate_access_integrity=False)
    assert isinstance(loaded, dict)
    return _part_of(loaded, precise)


def _part_of(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    return {key: _part_of(tree[key], v) if isinstance(v, dict) else tree[key] for key, v in like.items()}


def arrange_like(wanted: dict[str, Any], loaded: dict[str, Any], written: Written) -> dict[str, Any]:
    """Loaded state in the dictionaries of the kind of optimizer that `wanted` comes from.

    Args:
        wanted: a sharded state dict of that optimizer.
        loaded: its tensors where `wanted` has them.
        written: groups, step and scale of the optimizers that wrote the checkpoint.
    """
    step = written.step
    if "param_state" in wanted:
        counter = {} if step is None else {"step": step}
        return {
            "optimizer": {"param_groups": [{**group, **counter} for group in written.groups]},
            **written.scale,
            "param_state": loaded.get("param_state", {}),
            "param_state_sharding_type": MODEL_SPACE,
        }
    inner = loaded.get("optimizer", {}) if "optimizer" in wanted else loaded
    plain = {
        "state": {**inner.get("state", {}), **({} if step is None else {"common_step": step})},
        "param_groups": [{k: v for k, v in group.items() if k != "step"} for group in written.groups],
    }
    if "optimizer" in wanted:
        return {"optimizer": plain, **written.scale, "fp32_from_fp16_params": loaded.get("fp32_from_fp16_params", [])}
    return plain
