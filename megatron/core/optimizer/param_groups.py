"""Which parameters share a learning rate and a weight decay, here and in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from megatron.core.optimizer.optimizer_config import OptimizerConfig

logger = logging.getLogger(__name__)

ParamGroup = dict[str, Any]
ParamCondition = Callable[[str, Parameter], bool]

_IDENTITY_DEFAULTS = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
_SET_BY_FLAGS = ("betas", "eps", "momentum")
_SET_BY_IMPLEMENTATION = (
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    *("dampening", "nesterov", "params"),
)


def is_bias_or_one_dimensional(name: str, param: Parameter) -> bool:
    """Parameters that decay would only hurt: biases and norm weights."""
    return name.endswith(".bias") or param.ndim == 1


def build_param_groups(
    config: OptimizerConfig,
    model_chunks: Iterable[torch.nn.Module],
    no_weight_decay_cond: ParamCondition | None = None,
    scale_lr_cond: ParamCondition | None = None,
    lr_mult: float = 1.0,
) -> list[ParamGroup]:
    """Groups of trainable parameters in the order in which the model first needs each kind.

    A group is identified by its weight-decay multiplier, learning-rate multiplier, whether it holds experts
    and whether it has its own learning rate (`decoupled_lr`: embeddings and output layer). `max_lr` and
    `min_lr` bound what the scheduler sets.

    Args:
        no_weight_decay_cond: (name, parameter) -> whether it does not decay; default biases and 1-D
            parameters.
        scale_lr_cond: (name, parameter) -> whether its learning rate is multiplied by `lr_mult`; default
            none.
    """
    does_not_decay = no_weight_decay_cond or is_bias_or_one_dimensional
    groups: dict[tuple[float, float, bool, bool], list[Parameter]] = {}
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            if not param.requires_grad:
                continue
            identity = (
                0.0 if does_not_decay(name, param) else 1.0,
                lr_mult if scale_lr_cond is not None and scale_lr_cond(name, param) else 1.0,
                not getattr(param, "allreduce", True),
                config.decoupled_lr is not None and getattr(param, "is_embedding_or_output_parameter", False),
            )
            groups.setdefault(identity, []).append(param)
    return [_group(config, identity, params) for identity, params in groups.items()]


def empty_group_of_experts(config: OptimizerConfig) -> ParamGroup:
    """What a pipeline stage without experts has of them."""
    return _group(config, (1.0, 1.0, True, False), [])


def _group(config: OptimizerConfig, identity: tuple[float, float, bool, bool], params: list[Parameter]) -> ParamGroup:
    """With the rates that hold until a scheduler sets others."""
    wd_mult, lr_mult, _, is_decoupled = identity
    bounds = _lr_bounds(config, is_decoupled=is_decoupled)
    assert bounds["max_lr"] is not None
    rates = {"lr": bounds["max_lr"] * lr_mult, "weight_decay": config.weight_decay * wd_mult}
    return {"params": params, **dict(zip(_IDENTITY_DEFAULTS, identity)), **bounds, **rates}


def _lr_bounds(config: OptimizerConfig, *, is_decoupled: bool) -> dict[str, float | None]:
    if not is_decoupled:
        return {"max_lr": config.lr, "min_lr": config.min_lr}
    decoupled_min_lr = config.min_lr if config.decoupled_min_lr is None else config.decoupled_min_lr
    return {"max_lr": config.decoupled_lr, "min_lr": decoupled_min_lr}


def group_identity(group: ParamGroup) -> tuple[Any, ...]:
    """What a group is matched by; older checkpoints prefix the names with `pre_`."""
    return tuple(group.get(name, group.get(f"pre_{name}", default)) for name, default in _IDENTITY_DEFAULTS.items())


def match_saved_groups(
    local_groups: Sequence[ParamGroup], saved_groups: Sequence[ParamGroup]
) -> list[tuple[ParamGroup, ParamGroup | None]]:
    """For each local group what to load into it, and the saved group it comes from.

    Learning rates and the step counter come from the checkpoint, parameters and what flags or the
    implementation decide stay. A kind of parameter that the writing rank did not have (another pipeline
    layout) starts from the counters of the first saved group, which all groups share.
    """
    if not saved_groups:
        raise ValueError("the optimizer state to load has no param_groups")
    by_identity = {group_identity(group): group for group in saved_groups}
    matches: list[tuple[ParamGroup, ParamGroup | None]] = []
    for local in local_groups:
        saved = by_identity.get(group_identity(local))
        kept = {name: local[name] for name in (*_SET_BY_FLAGS, *_SET_BY_IMPLEMENTATION) if name in local}
        if saved is None:
            step = {"step": saved_groups[0]["step"]} if "step" in saved_groups[0] else {}
            matches.append(({**local, **step}, None))
            continue
        for name in _SET_BY_FLAGS:
            if name in local and name in saved and _as_tuple(saved[name]) != _as_tuple(local[name]):
                logger.warning("%s is %s, the checkpoint was made with %s", name, local[name], saved[name])
        matches.append(({**local, **saved, **kept}, saved))
    return matches


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
