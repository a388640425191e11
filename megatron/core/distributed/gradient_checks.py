"""What is looked at in a bucket of gradients before it is reduced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

logger = logging.getLogger(__name__)

NORMS_REMEMBERED = 100
LARGE_NORM_FACTOR = 10.0


def refuse(complaint: str) -> None:
    """What is done about gradients that are not finite where nobody has said otherwise.

    Raises:
        RuntimeError: always. Other ranks may wait for this one then; a program that has several says otherwise.
    """
    raise RuntimeError(complaint)


def check_finite_gradients(
    grads: Tensor, params: Sequence[Parameter], names: Mapping[Parameter, str], complain: Callable[[str], None]
) -> None:
    """Complain about the first parameter, in the order of the forward pass, whose gradient is not finite.

    Args:
        grads: the bucket.
        params: its parameters, in the order of the buffer, last used first.
        complain: is told the parameter and this rank.
    """
    # One pass and no temporary: the sum of finite gradients is finite short of 1e38.
    if torch.isfinite(grads.sum(dtype=torch.float32)):
        return
    for param in reversed(params):
        bad = ~torch.isfinite(param.main_grad)  # type: ignore[attr-defined]
        if bad.any():
            complain(
                f"gradient of {names[param]} has {int(bad.sum())} NaN or infinite "
                f"values of {param.numel()} on rank {_global_rank()}, before the data-parallel reduction"
            )
            return


@dataclass
class LargeNormWarning:
    """Warns of a norm far above the largest of the first `NORMS_REMEMBERED` ones."""

    largest_norms: list[float] = field(default_factory=list)

    def look_at(self, grads: Tensor) -> None:
        """Remember the norm of a bucket, or compare it with those remembered."""
        norm = float(torch.linalg.vector_norm(grads, dtype=torch.float32))
        ceiling = LARGE_NORM_FACTOR * max(self.largest_norms, default=float("inf"))
        if len(self.largest_norms) < NORMS_REMEMBERED:
            self.largest_norms.append(norm)
        elif norm > ceiling:
            logger.warning(
                "gradient norm %.3e on rank %d is more than %g times the largest of the first %d (%.3e)",
                *(norm, _global_rank(), LARGE_NORM_FACTOR, NORMS_REMEMBERED, ceiling / LARGE_NORM_FACTOR),
            )


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
