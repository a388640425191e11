"""The public path of what routers and dispatchers are made of; it lies in the modules that are named here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core.transformer.moe.aux_loss import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    mean_aux_losses,
    reduce_aux_losses_tracker_across_ranks,
    save_to_aux_losses_tracker,
    track_layers,
)
from megatron.core.transformer.moe.balancing import sinkhorn
from megatron.core.transformer.moe.permutation import permute, sort_chunks_by_idxs, unpermute
from megatron.core.transformer.moe.router import apply_random_logits
from megatron.core.transformer.moe.routing import group_limited_topk

__all__ = [
    "MoEAuxLossAutoScaler",
    "apply_random_logits",
    "clear_aux_losses_tracker",
    "get_moe_layer_wise_logging_tracker",
    "group_limited_topk",
    "permute",
    "reduce_aux_losses_tracker_across_ranks",
    "save_to_aux_losses_tracker",
    "sinkhorn",
    "sort_chunks_by_idxs",
    "track_moe_metrics",
    "unpermute",
]


def track_moe_metrics(
    loss_scale: float,
    iteration: int,
    writer: Any,
    wandb_writer: Any = None,
    total_loss_dict: dict[str, Tensor] | None = None,
    per_layer_logging: bool = False,
    force_initialize: bool = False,
    track_names: list[str] | None = None,
    num_layers: int | None = None,
    moe_layer_freq: int | list[int] | None = None,
) -> None:
    """Hand the routers' losses of one iteration to trackers, and begin the next one. All ranks call this.

    Args:
        loss_scale: what the sums over micro-batches are multiplied by, 1 / their number.
        writer: has `add_scalar(name, value, iteration)`; None on ranks that do not log.
        wandb_writer: has `log(values, iteration)`.
        total_loss_dict: gets each loss's mean over layers with experts added.
        per_layer_logging: each layer's too, as `moe/NAME_layer_N`.
        force_initialize: have entries for `track_names` on this rank, which may have no such layer; needs `num_layers`.
        moe_layer_freq: which of the `num_layers` have experts, as of the configuration; None: all of them.

    Communicates: see `reduce_aux_losses_tracker_across_ranks`.
    """
    if force_initialize:
        if num_layers is None:
            raise ValueError("force_initialize needs num_layers")
        track_layers(track_names or [], num_layers)
    count = _layers_with_experts(num_layers, moe_layer_freq)
    for name, (mean, by_layer) in mean_aux_losses(1, count or 1, track_names).items():
        mean, by_layer = mean * loss_scale, by_layer * loss_scale
        if count is None:
            mean = mean / len(by_layer)
        values = {name: mean}
        if total_loss_dict is not None:
            total_loss_dict[name] = total_loss_dict.get(name, 0.0) + mean
        if per_layer_logging:
            values |= {f"moe/{name}_layer_{i}": value for i, value in enumerate(by_layer)}
        if writer is not None:
            for key, value in values.items():
                writer.add_scalar(key, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log({key: float(value) for key, value in values.items()}, iteration)


def _layers_with_experts(num_layers: int | None, freq: int | list[int] | None) -> int | None:
    """None where the entries themselves say how many layers there are."""
    if isinstance(freq, list):
        return sum(freq)
    if num_layers is None:
        return None
    return num_layers if freq is None else -(-num_layers // freq)
