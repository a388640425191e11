"""Parts that do nothing, for the places of a layer spec that stay empty."""

from __future__ import annotations

from typing import Any

from torch import nn


class IdentityOp(nn.Module):
    """Returns its first argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class IdentityFuncOp(IdentityOp):
    """Returns a function that returns its first argument: the empty place of a bias-dropout-add."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward
