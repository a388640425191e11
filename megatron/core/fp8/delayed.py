"""Scales from the maxima of earlier steps (delayed scaling, arXiv:2209.05433, section 4.2).

A product needs the scale of its operands before it knows their maximum. Here it takes one from the maxima of the last
steps, and notes the maximum that it finds. Scales change once a step, when gradients are complete: all microbatches,
and a forward pass that is run again, have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import all_reduce
from megatron.core.fp8.quantization import scale_for
from megatron.core.fp8.recipes import Recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_size, groups_of

OPERANDS = ("x", "weight", "grad")
"""What a linear layer quantizes: its input, its weight, the gradient of its output."""


class DelayedScales:
    """Of the three operands of one weight.

    An operand of which no maximum is known yet is scaled by the one that it has now: there is no step without scales.

    Args:
        types: the fp8 type of each operand.
        is_expert: the weight is one of an expert, whose replicas are other ranks.
    """

    def __init__(self, recipe: Recipe, types: tuple[torch.dtype, ...], is_expert: bool) -> None:
        self.recipe, self.types, self.is_expert = recipe, types, is_expert
        where = device.current_device()
        self.history = torch.zeros(recipe.history, len(OPERANDS), device=where)
        """Maxima, the last step's first."""
        self.scales = torch.ones(len(OPERANDS), device=where)
        self.seen = torch.zeros(len(OPERANDS), device=where)
        """Maxima of this step."""
        self.known = [False] * len(OPERANDS)
        """Which scales come from a maximum."""

    def note(self, operand: int, magnitude: Tensor) -> None:
        """Take a maximum into account for later steps."""
        self.seen[operand] = torch.maximum(self.seen[operand], magnitude)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; between steps there are no maxima of this step."""
        return {
            "amax_history": self.history.cpu().clone(),
            "scale": self.scales.cpu().clone(),
            "known": torch.tensor(self.known),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` left off; of a longer history the last steps, behind a shorter one zeros."""
        kept = state["amax_history"][: len(self.history)]
        self.history.zero_()[: len(kept)].copy_(kept)
        self.scales.copy_(state["scale"])
        self.seen.zero_()
        self.known = state["known"].tolist()


def update_delayed_scales(model: list[nn.Module], groups: ProcessGroupCollection | None = None) -> None:
    """Begin a step with scales that follow from the maxima of the former ones; nothing for models without such scales.

    Communicates: all-reduces of all maxima over the tensor parallel ranks and the replicas, which agree afterwards
    (with `tp_only_amax_red` over the tensor and context parallel ranks only).
    """
    found = list(_scales_of(model))
    if not found:
        return
    groups = groups or groups_of(model[0])
    for is_expert in (False, True):
        states = [scales for scales in found if scales.is_expert is is_expert]
        if states:
            among = _ranks_that_agree(groups, is_expert, states[0].recipe.only_shards_agree)
            _update(states, [group for group in among if get_pg_size(group) > 1])


def _scales_of(model: list[nn.Module]) -> Iterator[DelayedScales]:
    for chunk in model:
        for module in chunk.modules():
            own: Callable[[], list[Any]] = getattr(module, "all_products", list)
            for products in own():
                scales = getattr(products, "delayed", None)
                if scales is not None:
                    yield scales


def _ranks_that_agree(
    groups: ProcessGroupCollection, is_expert: bool, only_shards: bool
) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    if is_expert:
        return groups.expt_tp, None if only_shards else groups.expt_dp
    return groups.tp, groups.cp if only_shards else groups.dp_cp


def _update(states: list[DelayedScales], groups: list[ProcessGroup | None]) -> None:
    recipe, types = states[0].recipe, states[0].types
    seen = torch.stack([state.seen for state in states])  # [weights, 3]
    for group in groups:
        all_reduce(seen, torch.distributed.ReduceOp.MAX, group=group, what="maxima for fp8")
    seen = torch.where(seen.isfinite(), seen, 0.0)
    history = torch.stack([state.history for state in states]).roll(1, dims=1)
    history[:, 0] = seen
    magnitude = history.amax(1) if recipe.largest else seen
    fresh = torch.stack([scale_for(magnitude[:, i], types[i], margin=recipe.margin) for i in range(len(types))], dim=1)
    old = torch.stack([state.scales for state in states])
    scales = torch.where(magnitude > 0, fresh, old)
    # Asked for only until all are known: it waits for the device.
    known = None if all(all(state.known) for state in states) else (magnitude > 0).tolist()
    for i, state in enumerate(states):
        state.history.copy_(history[i])
        state.scales.copy_(scales[i])
        state.seen.zero_()
        if known is not None:
            state.known = [before or now for before, now in zip(state.known, known[i])]
