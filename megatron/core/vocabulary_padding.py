"""Rows that round the vocabulary up to a multiple of the tensor parallel size.

No token stands for them and no gradient reaches them. How many there are depends on the layout, so nothing that is
counted or measured over a model may include them.
"""

from __future__ import annotations

from torch import Tensor


def mark_padding_rows(param: Tensor, first_row: int, vocab_size: int | None) -> None:
    """Note how many of the last rows of `param`, rows `first_row` and up of a padded table, are padding.

    Args:
        vocab_size: rows of the table without padding; None if that is not known, then none are.
    """
    rows = param.size(0)
    used = rows if vocab_size is None else min(max(vocab_size - first_row, 0), rows)
    param.num_padding_rows = rows - used  # type: ignore[attr-defined]


def numel_without_padding(param: Tensor) -> int:
    """Elements of the flattened parameter before its padding rows."""
    padding = getattr(param, "num_padding_rows", 0)
    return param.numel() - (padding * (param.numel() // param.size(0)) if padding else 0)


def without_padding(param: Tensor, piece: Tensor, start: int = 0) -> Tensor:
    """What of `piece`, elements `start` and up of something shaped like `param`, is not padding; `piece` itself if all.

    >>> import torch
    >>> table = torch.empty(4, 2)
    >>> mark_padding_rows(table, 0, vocab_size=3)
    >>> without_padding(table, torch.arange(5), start=3)
    tensor([0, 1, 2])
    """
    used = numel_without_padding(param) - start
    return piece if used >= piece.numel() else piece.reshape(-1)[: max(used, 0)]
