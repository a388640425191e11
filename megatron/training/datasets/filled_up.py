"""A dataset whose size is a whole number of batches, without leaving out or repeating a sample."""

from __future__ import annotations

from typing import Any

import torch


class FilledUp(torch.utils.data.Dataset):
    """`dataset`, followed by samples without loss, so that its size is a multiple of `batch_size`.

    Its samples are dictionaries with a `loss_mask`; those that fill up are the first one with a mask of zeros.
    """

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset = dataset
        self._size = -(-len(dataset) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if idx < len(self.dataset):
            return self.dataset[idx]
        sample = self.dataset[0]
        return {**sample, "loss_mask": torch.zeros_like(torch.as_tensor(sample["loss_mask"]))}
