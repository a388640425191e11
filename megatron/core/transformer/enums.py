"""Closed sets of choices inside a transformer."""

from __future__ import annotations

import enum

from megatron.core.enums import ModelType as ModelType


class LayerType(enum.Enum):
    """What one entry of a pipeline stage's layout is."""

    embedding = 1
    loss = 2
    encoder = 3
    decoder = 4
    mtp = 5


class AttnType(enum.Enum):
    """Whether keys come from the sequence itself or from another one."""

    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    """Which keys a query may see."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5


class AttnBackend(enum.Enum):
    """Which family of kernels computes the attention core; `auto` takes the fastest that fits."""

    flash = 1
    fused = 2
    unfused = 3
    local = 4
    auto = 5
