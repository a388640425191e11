"""What a checkpoint of a training run consists of, and putting it back."""

from __future__ import annotations

import argparse
import enum
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron.core import device, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.collective import gather_from_all
from megatron.core.dist_checkpointing.safe_load import register_safe_class
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend
from megatron.training.train_state import TrainState

CHECKPOINT_VERSION = 3.0
FLAG_ENUMS: tuple[type[enum.Enum], ...] = (ModelType, AttnBackend)
for flag_enum in FLAG_ENUMS:
    register_safe_class(flag_enum)

_COUNTERS = ("iteration", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


# ---- arguments and counters ----


def saved_arguments(args: argparse.Namespace, state: TrainState) -> argparse.Namespace:
    """The arguments as a checkpoint keeps them: plain values, with the run's counters among them."""
    values = {name: plain_value(value) for name, value in vars(args).items() if not name.startswith("_")}
    values.update({name: getattr(state, name) for name in _COUNTERS})
    return argparse.Namespace(**values)


def plain_value(value: Any) -> Any:
    """`value` made of classes that a restricted reader knows; anything else becomes text."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, *FLAG_ENUMS)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value] if isinstance(value, list) else tuple(map(plain_value, value))
    if isinstance(value, (set, frozenset)):
        return {plain_value(item) for item in value}
    if isinstance(value, dict):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else repr(value)


def restored_state(state_dict: dict[str, Any]) -> TrainState:
    """Counters of the run that wrote a checkpoint."""
    saved = state_dict.get("args")
    counters = {name: getattr(saved, name, None) or 0 for name in _COUNTERS}
    counters["iteration"] = state_dict.get("iteration", state_dict.get("total_iters", counters["iteration"]))
    return TrainState(
        **counters,
        num_floating_point_operations_so_far=state_dict.get("num_floating_point_operations_so_far", 0.0),
    )


def common_entries(args: argparse.Namespace, state: TrainState, scheduler: Any | None) -> dict[str, Any]:
    """The entries that do not depend on the layout."""
    entries: dict[str, Any] = {
        "args": saved_arguments(args, state),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": state.iteration,
        "num_floating_point_operations_so_far": float(state.num_floating_point_operations_so_far),
    }
    if scheduler is not None and not args.no_save_optim:
        entries["opt_param_scheduler"] = scheduler.state_dict()
    return entries


# ---- model ----


def model_keys(model: list[nn.Module]) -> list[str]:
    """Key of each model chunk."""
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def bare(module: nn.Module) -> nn.Module:
    """The module inside wrappers for data parallelism and half precision."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def sharded_model(model: list[nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    """Description of the parameters of every chunk."""
    return {
        key: chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for key, chunk in zip(model_keys(model), model)
    }


def plain_model(model: list[nn.Module]) -> dict[str, Any]:
    """Parameters of every chunk under their local names."""
    states = {}
    for key, chunk in zip(model_keys(model), model):
        module = bare(chunk)
        make = getattr(module, "state_dict_for_save_checkpoint", module.state_dict)
        states[key] = make()
    return states


def load_model(model: list[nn.Module], state_dict: dict[str, Any], strict: bool) -> None:
    """Copy loaded parameters into the model."""
    for key, chunk in zip(model_keys(model), model):
        chunk.load_state_dict(state_dict[key], strict=strict)


# ---- random numbers ----


def rng_state() -> dict[str, Any]:
    """State of all of this rank's generators."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device.default_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def rng_states_of_replicas() -> list[dict[str, Any]]:
    """One state if all data parallel ranks draw the same numbers, else one for each of them."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own = rng_state()
    digests = gather_from_all(_digest(own), group)
    return [own] if len(set(digests)) == 1 else gather_from_all(own, group)


def _digest(state: dict[str, Any]) -> bytes:
    name, keys, *rest = state["np_rng_state"]
    tensors = [state["torch_rng_state"], state["cuda_rng_state"], *state["rng_tracker_states"].values()]
    text = repr((state["random_rng_state"], name, rest, list(state["rng_tracker_states"])))
    digest = hashlib.sha256(text.encode())
    for array in (keys, *(tensor.cpu().numpy() for tensor in tensors)):
        digest.update(array.tobytes())
    return digest.digest()


def sharded_rng_state() -> ShardedObject:
    """The state of this place in the grid of pipeline and tensor ranks."""
    return rng_object(rng_states_of_replicas())


def rng_object(states: list[dict[str, Any]] | None) -> ShardedObject:
    """Description of the random state; None to load it."""
    ps = parallel_state
    return ShardedObject(
        "rng_state",
        states,
        (ps.get_pipeline_model_parallel_world_size(), ps.get_tensor_model_parallel_world_size()),
        (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank()),
        replica_id=ps.get_data_parallel_rank(with_context_parallel=True),
    )


def restore_rng_state(states: list[dict[str, Any]]) -> None:
    """Continue the generators of a run where it was saved."""
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    state = states[replica] if replica < len(states) else states[0]
    if not state["rng_tracker_states"]:
        raise ValueError("rng_tracker_states in the checkpoint is empty")
    _set_rng_state(state)


@contextmanager
def rng_preserved() -> Iterator[None]:
    """All of this rank's generators stand where they stood, whatever is drawn or seeded inside."""
    before = rng_state()
    try:
        yield
    finally:
        _set_rng_state(before)


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    device.set_default_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
