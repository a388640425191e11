"""Dropout that keeps one byte an element for backward (Srivastava et al., JMLR 15 (2014), section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """x with elements dropped by chance and the others scaled up; x itself where nothing is to be dropped.

    The same numbers as `torch.nn.functional.dropout`, which on a CPU keeps its mask in the type of x.
    """
    if probability == 0.0 or not training:
        return x
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, probability)
    dropped, _ = torch.native_dropout(x, probability, True)
    return dropped
