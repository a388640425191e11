"""A model as whole tensors under our names, read one at a time, wherever they come from.

Names are those of the layers of this library (`decoder.layers.3.input_layernorm.weight`), with the layer's number in
the whole model. The sharded formats name some of them otherwise, and stack the layers (`stacked_key`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

OF_VOCABULARY = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "output_layer.bias",
    "lm_head.output_layer.weight",
    "lm_head.output_layer.bias",
)
"""Tensors with a row for each token."""
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Name of a norm in sharded checkpoints -> its name in the model."""
_NORM_OF_MIXER = re.compile(r"(.*\blayers\.\d+)\.norm\.(\w+)")
"""A state space layer's norm, not that within its mixer."""
_LAYER = re.compile(r"(?P<block>.*?\blayers)\.(?P<number>\d+)\.(?P<rest>.+)")


class WholeState(ABC):
    """Tensors by name. `name in state` and iteration are cheap; `read` costs one tensor of memory."""

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Names, in the order in which the tensors are best read."""

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abstractmethod
    def meta(self, name: str) -> Tensor:
        """Shape and type, as a tensor without data."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""


class DictState(WholeState):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def meta(self, name: str) -> Tensor:
        return self.tensors[name].to("meta")

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class WithVocabulary(WholeState):
    """`state` with `rows` rows in each tensor that has one for each token: cut off, or the last one repeated."""

    def __init__(self, state: WholeState, rows: int) -> None:
        self.state, self.rows = state, rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def meta(self, name: str) -> Tensor:
        return self._fit(name, self.state.meta(name))

    def read(self, name: str) -> Tensor:
        return self._fit(name, self.state.read(name))

    def _fit(self, name: str, tensor: Tensor) -> Tensor:
        missing = self.rows - tensor.size(0) if name in OF_VOCABULARY else 0
        if missing > 0:
            return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
        return tensor[: self.rows] if missing < 0 else tensor


class Cast(WholeState):
    """`state` with its floating-point tensors in another type."""

    def __init__(self, state: WholeState, dtype: torch.dtype) -> None:
        self.state, self.dtype = state, dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def meta(self, name: str) -> Tensor:
        return self._cast(self.state.meta(name))

    def read(self, name: str) -> Tensor:
        return self._cast(self.state.read(name))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class Stacked(NamedTuple):
    """Where a tensor lies in a sharded checkpoint of equal layers."""

    key: str
    layer: int | None
    """Place along the first axis; None for a tensor outside of the layers."""


def sharded_name(name: str) -> str:
    """Name in a sharded checkpoint that does not stack layers."""
    match = _NORM_OF_MIXER.fullmatch(name)
    if match is not None:
        return f"{match[1]}.mixer.in_proj.layer_norm_{match[2]}"
    for fused, plain in FUSED_NORMS.items():
        head, found, kind = name.rpartition(f".{plain}")
        if found:
            return f"{head}.{fused}{kind}"
    return name


def plain_name(name: str) -> str:
    """Inverse of `sharded_name`."""
    for fused, plain in FUSED_NORMS.items():
        name = name.replace(f".{fused}", f".{plain}")
    return name.replace(".mixer.in_proj.layer_norm_", ".norm.")


def stacked_key(name: str) -> Stacked:
    """Where a tensor of ours lies in a sharded checkpoint.

    >>> stacked_key("decoder.layers.3.input_layernorm.weight")
    Stacked(key='decoder.layers.self_attention.linear_qkv.layer_norm_weight', layer=3)
    """
    match = _LAYER.fullmatch(sharded_name(name))
    if match is None:
        return Stacked(name, None)
    return Stacked(f"{match['block']}.{match['rest']}", int(match["number"]))


def name_of_layer(key: str, layer: int) -> str:
    """Inverse of `stacked_key`."""
    block, _, rest = key.partition("layers.")
    return plain_name(f"{block}layers.{layer}.{rest}")


def with_layer_offset(name: str, offset: int) -> str:
    """The name with its layer counted from another one."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    return f"{match['block']}.{int(match['number']) + offset}.{match['rest']}"
