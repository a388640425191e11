"""What a Mamba mixer's projection and convolution stack: sharded checkpoints store the parts singly, and tensor
parallel ranks have a part of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .whole_state import WholeState

PARTS = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}
_STACKED = re.compile(r"(?P<mixer>.*\.mixer\.)(?P<layer>in_proj|conv1d)\.(weight|bias)")
_PART = re.compile(r"(?P<name>.*\.mixer\.(?P<layer>in_proj|conv1d)\.(weight|bias))\.(?P<part>z|x|B|C|dt)")


class Part(NamedTuple):
    """Rows of a stacked tensor."""

    key: str
    start: int
    length: int


def sections_of(name: str, shape_of: Callable[[str], torch.Size]) -> list[int] | None:
    """Rows of each part of a stacked tensor, None for other tensors.

    Args:
        shape_of: shapes of this tensor and of its mixer's others, all whole or all of one tensor parallel rank.
    """
    match = _STACKED.fullmatch(name)
    if match is None:
        return None
    mixer, rows = match["mixer"], shape_of(name)[0]
    inner, heads = shape_of(f"{mixer}out_proj.weight")[1], shape_of(f"{mixer}dt_bias")[0]
    if match["layer"] == "conv1d":
        return [inner, (rows - inner) // 2, (rows - inner) // 2]
    states = (rows - 2 * inner - heads) // 2
    return [inner, inner, states, states, heads]


def parts_of(name: str, shape_of: Callable[[str], torch.Size]) -> list[Part]:
    """The parts under their keys in a sharded checkpoint; none of a tensor that is no stack."""
    sections = sections_of(name, shape_of)
    if sections is None:
        return []
    layer = _STACKED.fullmatch(name)["layer"]  # type: ignore[index]
    starts = [sum(sections[:i]) for i in range(len(sections))]
    return [Part(f"{name}.{part}", *span) for part, span in zip(PARTS[layer], zip(starts, sections))]


def stacked_name(key: str) -> tuple[str, int] | None:
    """(tensor, place in it) of a part's key; None for other keys."""
    match = _PART.fullmatch(key)
    return None if match is None else (match["name"], PARTS[match["layer"]].index(match["part"]))


class InParts(WholeState):
    """`state` with the parts of each stacked tensor in its place."""

    def __init__(self, state: WholeState) -> None:
        self.state = state
        self._names: dict[str, tuple[str, Part | None]] = {}
        for name in state:
            parts = parts_of(name, lambda other: state.meta(other).shape)
            if not parts:
                self._names[name] = name, None
            self._names.update({part.key: (name, part) for part in parts})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def meta(self, name: str) -> Tensor:
        return self._rows(name, self.state.meta)

    def read(self, name: str) -> Tensor:
        return self._rows(name, self.state.read)

    def _rows(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        whole, part = self._names[name]
        return get(whole) if part is None else get(whole).narrow(0, part.start, part.length)


class Joined(WholeState):
    """Inverse of `InParts`."""

    def __init__(self, state: WholeState) -> None:
        self.state = state
        self._names: dict[str, list[str]] = {}
        for key in state:
            found = stacked_name(key)
            if found is None:
                self._names[key] = [key]
            else:
                name, place = found
                parts = self._names.setdefault(name, [""] * len(PARTS[_STACKED.fullmatch(name)["layer"]]))  # type: ignore[index]
                parts[place] = key

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def meta(self, name: str) -> Tensor:
        return self._join([self.state.meta(key) for key in self._names[name]])

    def read(self, name: str) -> Tensor:
        return self._join([self.state.read(key) for key in self._names[name]])

    @staticmethod
    def _join(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
