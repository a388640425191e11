"""How learning rate and weight decay change over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class RegularizationConfig:
    """Weight decay that changes over the run."""

    start_weight_decay: float | None = None
    """Weight decay at the first step."""
    end_weight_decay: float | None = None
    """Weight decay at the last step."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How it moves from the one to the other."""


@dataclass(kw_only=True)
class LearningRateConfig:
    """Warmup, decay and where they come from on resuming."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay after warmup."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last part of a warmup-stable-decay (WSD) schedule."""
    lr_decay_iters: int | None = None
    """Steps until the decay ends; unset is the whole run."""
    lr_decay_samples: int | None = None
    """Samples until the decay ends; unset is the whole run."""
    lr_wsd_decay_samples: int | None = None
    """Samples of the last part of a WSD schedule."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the last part of a WSD schedule."""
    lr_warmup_fraction: float | None = None
    """Share of the decay steps spent warming up."""
    lr_warmup_iters: int = 0
    """Steps of linear warmup."""
    lr_warmup_samples: int = 0
    """Samples of linear warmup."""
    lr_warmup_init: float = 0.0
    """Learning rate that the warmup starts from."""
    override_opt_param_scheduler: bool = False
    """On resuming, these flags replace the checkpoint's schedule."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resuming, the checkpoint's schedule replaces these flags."""
