"""Keys and values of texts in a rectangle: a row for each text, as wide as the longest may become.

r rows, g query groups of one tensor parallel rank, l tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rows = slice | Tensor
"""Of consecutive rows, or their numbers."""


class RowMemory:
    """For each layer keys and values [r, g, l, d], made when it first writes."""

    def __init__(self) -> None:
        self.num_rows = self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def resize(self, num_rows: int, length: int, kept: int) -> None:
        """Make room for so many rows of so many tokens, and keep of the first `kept` rows what still has room."""
        if (num_rows, length) == (self.num_rows, self.length):
            return
        common = min(length, self.length)
        self.num_rows, self.length = num_rows, length
        for layer, memories in self._layers.items():
            fresh = [memory.new_zeros(num_rows, memory.size(1), length, memory.size(3)) for memory in memories]
            for new, old in zip(fresh, memories):
                new[:kept, :, :common] = old[:kept, :, :common]
            self._layers[layer] = fresh[0], fresh[1]

    def clear(self) -> None:
        """Give everything back."""
        self.num_rows = self.length = 0
        self._layers.clear()

    def move(self, source: int, target: int) -> None:
        """One row takes the place of another."""
        for memories in self._layers.values():
            for memory in memories:
                memory[target] = memory[source]

    def write(self, layer_number: int, rows: Rows, places: Rows, key: Tensor, value: Tensor) -> None:
        """Keep keys and values [rows, g, places, d]; or [rows, g, d], one of each row, where `places` is a tensor."""
        if layer_number not in self._layers:
            shape = (self.num_rows, key.size(1), self.length)
            # Zeros: what a mask hides is still multiplied by 0, and must not be nan.
            self._layers[layer_number] = (key.new_zeros(*shape, key.size(-1)), value.new_zeros(*shape, value.size(-1)))
        keys, values = self._layers[layer_number]
        keys[rows, :, places], values[rows, :, places] = key, value

    def read(self, layer_number: int, rows: Rows, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, g, length, d] of the first tokens."""
        keys, values = self._layers[layer_number]
        return keys[rows, :, :length], values[rows, :, :length]

    @property
    def num_bytes(self) -> int:
        """That are held."""
        return sum(memory.numel() * memory.itemsize for memories in self._layers.values() for memory in memories)


def lengths_mask(lengths: Tensor, longest: int) -> Tensor:
    """[r, 1, 1, longest] bool: True for the first `lengths` [r] tokens."""
    return (torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None]
