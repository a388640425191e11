"""A model as whole tensors under our names, read one at a time, wherever they come from.

Names are those of the layers of this library (`decoder.layers.3.input_layernorm.weight`), with the numbers of layer and
expert in the whole model. The sharded formats name some of them otherwise, and stack layers and experts (`Naming`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
LATENT_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
"""The same of latent attention, where no single linear layer follows the norm before attention."""
_NORM_OF_MIXER = re.compile(r"(.*\blayers\.\d+)\.norm\.(\w+)")
"""A state space layer's norm, not that within its mixer."""
_BEFORE_EXPERTS = "pre_mlp_layernorm."
_MLP_NORM = {fused: plain for fused, plain in FUSED_NORMS.items() if plain == _BEFORE_EXPERTS}
"""No single linear layer follows the norm before experts: it keeps its name in sharded checkpoints."""
_LAYER = re.compile(r"(?P<block>.*?\blayers)\.(?P<number>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<head>.*\.experts)\.local_experts\.(?P<number>\d+)\.(?P<rest>.+)")
_STACK_OF_LAYERS = re.compile(r"(.*?\blayers)\.(?!\d)(.+)")
_STACK_OF_EXPERTS = re.compile(r"(.*\.experts)\.experts\.(.+)")


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
    """Where a tensor lies in a sharded checkpoint."""

    key: str
    place: tuple[int, ...]
    """Along the first axes: of its layer, of its expert, of both or of neither."""


def plain_name(name: str) -> str:
    """Name in the model of what sharded checkpoints, and Transformer Engine, name otherwise."""
    for fused, plain in (FUSED_NORMS | LATENT_NORMS).items():
        name = name.replace(f".{fused}", f".{plain}")
    return name.replace(".mixer.in_proj.layer_norm_", ".norm.")


@dataclass(frozen=True)
class Naming:
    """How sharded checkpoints name the parameters of a model.

    >>> Naming().place("decoder.layers.3.input_layernorm.weight")
    Stacked(key='decoder.layers.self_attention.linear_qkv.layer_norm_weight', place=(3,))
    """

    with_experts: frozenset[str] = frozenset()
    """Layers that are mixtures of experts, as `decoder.layers.3`."""
    layers_differ: bool = False
    """Some layers are such mixtures, some not: then each has keys of its own, and there is no axis for them."""
    latent: bool = False
    """Attention is latent."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Naming:
        """Of the model that has these parameters."""
        names = list(names)
        matches = [match for match in map(_LAYER.fullmatch, names) if match is not None]
        layers = {f"{match['block']}.{match['number']}" for match in matches}
        mixtures = {f"{m['block']}.{m['number']}" for m in matches if m["rest"].startswith("mlp.router.")}
        latent = any(".self_attention.linear_kv_down_proj." in name for name in names)
        return cls(frozenset(mixtures), bool(mixtures) and mixtures != layers, latent)

    def sharded_name(self, name: str) -> str:
        """The name that a norm has there, after the linear layer that follows it."""
        match = _NORM_OF_MIXER.fullmatch(name)
        if match is not None:
            return f"{match[1]}.mixer.in_proj.layer_norm_{match[2]}"
        for fused, plain in (LATENT_NORMS | _MLP_NORM if self.latent else FUSED_NORMS).items():
            head, found, kind = name.rpartition(f".{plain}")
            if found and not (plain == _BEFORE_EXPERTS and head in self.with_experts):
                return f"{head}.{fused}{kind}"
        return name

    def place(self, name: str, stack_layers: bool | None = None) -> Stacked:
        """Where a tensor lies.

        Args:
            stack_layers: whether there is an axis for layers; default: if they are equal.
        """
        place: tuple[int, ...] = ()
        name = self.sharded_name(name)
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            name, place = f"{expert['head']}.experts.{expert['rest']}", (int(expert["number"]),)
        layer = _LAYER.fullmatch(name)
        if layer is None or not (not self.layers_differ if stack_layers is None else stack_layers):
            return Stacked(name, place)
        return Stacked(f"{layer['block']}.{layer['rest']}", (int(layer["number"]), *place))


def stacked_axes(key: str) -> int:
    """Number of axes that a key of a sharded checkpoint has for layers and experts."""
    return sum(pattern.fullmatch(key) is not None for pattern in (_STACK_OF_LAYERS, _STACK_OF_EXPERTS))


def name_at(key: str, place: tuple[int, ...]) -> str:
    """Inverse of `Naming.place`."""
    numbers = list(place)
    layers = _STACK_OF_LAYERS.fullmatch(key)
    if layers is not None:
        key = f"{layers[1]}.{numbers.pop(0)}.{layers[2]}"
    experts = _STACK_OF_EXPERTS.fullmatch(key)
    if experts is not None:
        key = f"{experts[1]}.local_experts.{numbers.pop(0)}.{experts[2]}"
    return plain_name(key)


def layer_of(name: str) -> tuple[str, int] | None:
    """(block, number) of the layer that a parameter belongs to."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (match["block"], int(match["number"]))


def expert_of(name: str) -> int | None:
    """Number of the expert that a parameter belongs to."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else int(match["number"])


def with_layer_offset(name: str, offset: int) -> str:
    """The name with its layer counted from another one."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    return f"{match['block']}.{int(match['number']) + offset}.{match['rest']}"


def with_expert_offset(name: str, offset: int) -> str:
    """The name with its expert counted from another one."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    return f"{match['head']}.local_experts.{int(match['number']) + offset}.{match['rest']}"
