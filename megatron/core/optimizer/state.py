"""State of a torch optimizer to and from checkpoints that know neither its order nor the layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import optim_state_to_sharding_state
from megatron.core.optimizer.fused_adam import init_adam_state_of
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.muon import Muon, init_muon_state_of
from megatron.core.optimizer.param_groups import match_saved_groups

logger = logging.getLogger(__name__)


def init_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero moments and step counter for parameters that have none: what the first step would start from."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            init_adam_state_of(optimizer, param)


def init_sgd_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero momentum; the first step from it is the same as the first step without."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if group["momentum"] != 0.0 and optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def init_muon_state(optimizer: Muon) -> None:
    """Zero momentum of matrices, and of the other parameters what Adam has."""
    for param in optimizer.matrices:
        init_muon_state_of(optimizer, param)
    init_adam_state(optimizer)


def shard_inner_state(state_dict: dict[str, Any], sharded_params: dict[int, Any]) -> ShardedStateDict:
    """A torch optimizer's state dict with moments as shards `optimizer.state.<moment>.<parameter>`.

    Step counters, which all parameters share, become one `common_step`. Changes `state_dict` in place.

    Args:
        sharded_params: index in the state dict -> description of the model's parameter.
    """
    step = common_step(state_dict["state"])
    optim_state_to_sharding_state(state_dict, sharded_params, exclude_keys=("step",))
    for group in state_dict["param_groups"]:
        group.pop("params", None)  # numbers of this rank's parameters, which mean nothing elsewhere
    if step is not None:
        state_dict["state"]["common_step"] = step
    return state_dict


def common_step(state: Mapping[Any, Mapping[str, Any]]) -> Tensor | None:
    """The step counter of all parameters; None where the algorithm keeps none.

    Raises:
        ValueError: they differ, which one number cannot store.
    """
    steps = [entry["step"] for entry in state.values() if "step" in entry]
    if not steps:
        return None
    different = {float(step) for step in steps}
    if len(different) > 1:
        raise ValueError(f"parameters are at different steps ({sorted(different)}); they must be stepped together")
    return torch.as_tensor(steps[0]).detach().cpu().clone()


def load_inner_state(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    init_state_fn: Callable[[torch.optim.Optimizer], None],
) -> None:
    """Restore groups and moments from a torch state dict or a loaded `shard_inner_state`."""
    local = optimizer.state_dict()
    matches = match_saved_groups(local["param_groups"], state_dict["param_groups"])
    saved_state = dict(state_dict["state"])
    step = saved_state.pop("common_step", None)
    state: dict[int, dict[str, Any]] = {}
    for group, saved in matches:
        for local_index, saved_index in zip(group["params"], _saved_indices(group, saved), strict=True):
            if saved_index in saved_state:
                state[local_index] = dict(saved_state[saved_index])
                counter = step if step is not None else group.get("step")  # a distributed optimizer's is in groups
                if counter is not None:
                    state[local_index]["step"] = torch.as_tensor(counter, dtype=torch.float32).clone()
    _require_matching_shapes(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": [group for group, _ in matches]})
    if state:
        init_state_fn(optimizer)


def _saved_indices(group: dict[str, Any], saved: dict[str, Any] | None) -> list[int]:
    """Where the parameters of a group stand in the saved state; sharded states are in the local order."""
    indices = (saved or {}).get("params")
    if not indices:
        return group["params"]
    if len(indices) != len(group["params"]):
        raise ValueError(
            f"a parameter group has {len(group['params'])} parameters, {len(indices)} in the checkpoint; "
            "was it made by another model or layout?"
        )
    return indices


def _require_matching_shapes(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, entry in state.items():
        for name, value in entry.items():
            if name != "step" and isinstance(value, Tensor) and value.shape != params[index].shape:
                raise ValueError(
                    f"{name} of parameter {index} has shape {tuple(value.shape)} in the checkpoint, "
                    f"{tuple(params[index].shape)} in this model"
                )


def restore_scaler(grad_scaler: MegatronGradScaler | None, state_dict: Mapping[str, Any]) -> None:
    """Continue with the saved loss scale, where both this run and the saved one have one."""
    if grad_scaler is not None and "grad_scaler" in state_dict:
        grad_scaler.load_state_dict(state_dict["grad_scaler"])
    elif grad_scaler is not None:
        logger.warning("the checkpoint has no grad_scaler state; the loss scale starts at %g", float(grad_scaler.scale))
    elif "grad_scaler" in state_dict:
        logger.warning("this run scales no loss; the grad_scaler state of the checkpoint is not used")
