"""Optimizer state named after the parameters that it belongs to, so that it reshards with them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import TypeVar

import torch

from .core import CheckpointingException
from .dict_utils import nested_values
from .mapping import (
    LocalNonpersistentObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    StateDict,
)

ShardedParam = TypeVar("ShardedParam", ShardedTensor, ShardedTensorFactory)


def get_optim_param_to_id_map(optim_params_iter: Iterable[torch.nn.Parameter]) -> dict[int, int]:
    """`id` of a parameter -> its number in the optimizer's order; a parameter met twice keeps its first
    number."""
    numbers: dict[int, int] = {}
    for number, param in enumerate(optim_params_iter):
        numbers.setdefault(id(param), number)
    return numbers


def get_param_id_to_sharded_param_map(
    model_sharded_state_dict: ShardedStateDict, optim_params_iter: Iterable[torch.nn.Parameter]
) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """Number of a parameter in the optimizer's order -> its description in the model's sharded state dict.

    The state dict must hold the parameters themselves (`state_dict(keep_vars=True)`), not detached copies.

    Raises:
        ValueError: the state dict lacks parameters that the optimizer has.
    """
    params = list(optim_params_iter)
    numbers = get_optim_param_to_id_map(params)
    found: dict[int, ShardedTensor | ShardedTensorFactory] = {}
    for value in nested_values(model_sharded_state_dict):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and id(value.data) in numbers:
            found.setdefault(numbers[id(value.data)], value)
    missing = [tuple(params[n].shape) for n in sorted(set(numbers.values()) - set(found))]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(params)} optimizer parameters are not in the sharded state dict, "
            f"with shapes {missing[:5]}"
        )
    return found


def make_sharded_optimizer_tensor(model_param: ShardedParam, optim_param: torch.Tensor, prefix: str) -> ShardedParam:
    """Description of `optim_param`, which lies as the parameter does, under the name
    `<prefix>.<parameter>`."""
    key = f"{prefix}.{model_param.key}"
    if isinstance(model_param, ShardedTensorFactory):
        return replace(model_param, key=key, data=optim_param)
    if tuple(optim_param.shape) != tuple(model_param.local_shape):
        raise CheckpointingException(
            f"{key}: state has shape {tuple(optim_param.shape)}, its parameter {model_param.local_shape}"
        )
    return replace(model_param, key=key, data=optim_param, dtype=optim_param.dtype)


def optim_state_to_sharding_state(
    optim_state_dict: StateDict,
    id_to_sharded_param_map: dict[int, ShardedTensor],
    exclude_keys: tuple[str, ...] = (),
) -> None:
    """Describe the tensors of a torch optimizer's state dict, in place.

    State `exp_avg` of a parameter `w` gets the name `optimizer.state.exp_avg.w`; entries of `exclude_keys`
    are dropped, and the lists of parameter numbers are marked as not to be saved.
    """
    described: dict = {}
    for number, state in optim_state_dict["state"].items():
        if number not in id_to_sharded_param_map:
            raise ValueError(f"optimizer state {number} belongs to no parameter of the model's sharded state dict")
        param = id_to_sharded_param_map[number]
        described[number] = {
            name: make_sharded_optimizer_tensor(param, value, f"optimizer.state.{name}")
            for name, value in state.items()
            if name not in exclude_keys
        }
    optim_state_dict["param_groups"] = deepcopy(optim_state_dict["param_groups"])
    for group in optim_state_dict["param_groups"]:
        group["params"] = LocalNonpersistentObject(group["params"])
    optim_state_dict["state"] = described
