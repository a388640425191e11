"""How losses of a router join the model's: as gradients of their own, and in the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import all_reduce
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.transformer.moe.balancing import names_of_balancing_losses
from megatron.core.utils import get_pg_size


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """x as it is; backward adds `scale` times the gradient of a loss that nothing else depends on."""

    main_loss_backward_scale: Tensor | float = 1.0
    """What the schedule multiplies the model's own loss of a micro-batch by; see `set_loss_scale`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor) -> Tensor:
        ctx.save_for_backward(aux_loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        (aux_loss,) = ctx.saved_tensors
        return grad_output, torch.ones_like(aux_loss) * MoEAuxLossAutoScaler.main_loss_backward_scale

    @staticmethod
    def set_loss_scale(scale: Tensor | float) -> None:
        """The factor of the micro-batches that follow."""
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale


@dataclass
class TrackedLoss:
    """One kind of loss of the layers of this rank since the last log line."""

    values: Tensor
    """[layers of the model]; zero for layers elsewhere."""
    reduce_group: ProcessGroup | None = None
    """Ranks whose values are parts of a sum."""
    avg_group: ProcessGroup | None = None
    """Ranks whose values are those of other samples."""


_tracked: dict[str, TrackedLoss] = {}


def get_moe_layer_wise_logging_tracker() -> dict[str, TrackedLoss]:
    """Name of a loss -> its values by layer."""
    return _tracked


def save_to_aux_losses_tracker(
    name: str,
    loss: Tensor,
    layer_number: int,
    num_layers: int,
    reduce_group: ProcessGroup | None = None,
    avg_group: ProcessGroup | None = None,
) -> None:
    """Add a micro-batch's loss of layer `layer_number` (from 1)."""
    track_layers([name], num_layers)
    tracked = _tracked[name]
    tracked.reduce_group, tracked.avg_group = reduce_group, avg_group
    tracked.values[layer_number - 1] += loss.detach().to(torch.float32)


def clear_aux_losses_tracker() -> None:
    """Start anew, for the next iteration."""
    for tracked in _tracked.values():
        tracked.values.zero_()


def reduce_aux_losses_tracker_across_ranks(track_names: list[str] | None = None) -> None:
    """Give every rank the values of all layers: sums of partial values, means over replicas, sums over pipeline stages.

    Communicates: all-reduces of [layers] values over the groups given with them, and over the pipeline group.
    """
    pp_group = default_process_groups().pp if has_default_process_groups() else None
    for name in sorted(_tracked) if track_names is None else track_names:
        tracked = _tracked[name]
        for group in (tracked.reduce_group, tracked.avg_group):
            if get_pg_size(group) > 1:
                all_reduce(tracked.values, group=group, what="losses of the routers")
        tracked.values /= get_pg_size(tracked.avg_group)
        if get_pg_size(pp_group) > 1:
            all_reduce(tracked.values, group=pp_group, what="losses of the routers")


def mean_aux_losses(
    num_microbatches: int, num_moe_layers: int, track_names: list[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (mean over layers with experts, value of each layer), of one iteration's micro-batches; then start anew.

    `track_names`: which of them; None: all. To be called on every rank after every iteration; see
    `reduce_aux_losses_tracker_across_ranks`.
    """
    reduce_aux_losses_tracker_across_ranks(track_names)
    means = {}
    for name in sorted(_tracked) if track_names is None else track_names:
        by_layer = _tracked[name].values / num_microbatches
        means[name] = (by_layer.sum() / num_moe_layers, by_layer)
    clear_aux_losses_tracker()
    return means


def names_of_aux_losses(config: Any) -> list[str]:
    """The losses that routers of this configuration have."""
    names = list(names_of_balancing_losses(config).values())
    if config.moe_z_loss_coeff is not None:
        names.append("z_loss")
    return names


def track_layers(names: list[str], num_layers: int) -> None:
    """Have an entry for these losses on every stage, also one without such layers: all take part in the sums. A process
    may have had a model of fewer layers before."""
    for name in names:
        if name not in _tracked:
            _tracked[name] = TrackedLoss(torch.zeros(num_layers, device=device.current_device()))
        missing = num_layers - _tracked[name].values.numel()
        if missing > 0:
            _tracked[name].values = torch.nn.functional.pad(_tracked[name].values, (0, missing))
