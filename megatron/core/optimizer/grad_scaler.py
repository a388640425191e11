"""Loss scaling for fp16, whose smallest normal number is 6e-5: gradients are computed of `scale · loss`.

Dynamic scaling is from "Mixed Precision Training" (arXiv:1710.03740, section 3.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from megatron.core import device


class MegatronGradScaler(ABC):
    """Holds the scale as an fp32 tensor [1] on the device."""

    def __init__(self, initial_scale: float) -> None:
        if initial_scale <= 0.0:
            raise ValueError(f"loss scale ({initial_scale}) must be positive")
        self._scale = torch.tensor([initial_scale], dtype=torch.float32, device=device.current_device())

    @property
    def scale(self) -> Tensor:
        """What the loss is multiplied by."""
        return self._scale

    @property
    def inv_scale(self) -> Tensor:
        """1 / scale, divided in double precision."""
        return self._scale.double().reciprocal().float()

    @abstractmethod
    def update(self, found_inf: bool) -> None:
        """Adapt to a step whose gradients overflowed or did not."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class ConstantGradScaler(MegatronGradScaler):
    """The scale never changes; a step that overflows is skipped all the same."""

    def update(self, found_inf: bool) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class DynamicGradScaler(MegatronGradScaler):
    """The largest scale that does not overflow: grows after many clean steps, falls after overflows.

    It grows every `growth_interval` clean steps. The first `hysteresis - 1` overflows are let pass; that
    count starts anew only when the scale grows.
    """

    def __init__(
        self,
        initial_scale: float,
        min_scale: float,
        growth_factor: float,
        backoff_factor: float,
        growth_interval: int,
        hysteresis: int,
    ) -> None:
        super().__init__(initial_scale)
        if not 0.0 < min_scale <= initial_scale:
            raise ValueError(f"min_scale ({min_scale}) must be positive and at most initial_scale ({initial_scale})")
        if growth_factor <= 1.0:
            raise ValueError(f"growth_factor ({growth_factor}) must be more than 1")
        if not 0.0 < backoff_factor < 1.0:
            raise ValueError(f"backoff_factor ({backoff_factor}) must lie between 0 and 1")
        if growth_interval <= 0 or hysteresis <= 0:
            raise ValueError(f"growth_interval ({growth_interval}) and hysteresis ({hysteresis}) must be positive")
        self.min_scale, self.growth_factor, self.backoff_factor = min_scale, growth_factor, backoff_factor
        self.growth_interval, self.hysteresis = growth_interval, hysteresis
        self._growth_tracker = 0
        self._hysteresis_tracker = hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self._growth_tracker = 0
            self._hysteresis_tracker -= 1
            if self._hysteresis_tracker <= 0:
                self._scale = torch.clamp(self._scale * self.backoff_factor, min=self.min_scale)
            return
        self._growth_tracker += 1
        if self._growth_tracker == self.growth_interval:
            self._growth_tracker = 0
            self._hysteresis_tracker = self.hysteresis
            self._scale = self._scale * self.growth_factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self._scale,
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scale = state_dict["scale"].to(self._scale.device)
        self._growth_tracker = state_dict["growth_tracker"]
        self._hysteresis_tracker = state_dict["hysteresis_tracker"]
