"""A dense model as a mixture of experts that computes the same at first (arXiv:2212.05055; narrower experts:
arXiv:2410.07524, section 3.2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.transformer.moe.upcycling_utils import matrix_of_expert

from .whole_state import WholeState

_FEED_FORWARD = re.compile(r"(?P<layer>.*\blayers\.\d+(\.transformer_layer)?)\.mlp\.(?P<rest>linear_fc[12]\.weight)")
_EXPERT = re.compile(r"(?P<mlp>.*\.mlp)\.experts\.local_experts\.(?P<number>\d+)\.(?P<rest>linear_fc[12]\.weight)")
_ROUTER = ".mlp.router.weight"
_BIAS = ".mlp.router.expert_bias"


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of a dense feed-forward block that is cut into `granularity` shards, see
    `transformer.moe.upcycling_utils`."""

    num_experts: int
    granularity: int
    layers: frozenset[str]
    """Those that become mixtures, as `decoder.layers.3`."""
    hidden_size: int
    gated: bool
    output_scale: float
    """On the second matrix: what makes the weights of a copy's shards sum to 1."""
    init_std: float
    seed: int
    expert_bias: bool = False

    def of_expert(self, dense: Tensor, number: int, rest: str) -> Tensor:
        """An expert's matrix, from the dense block's; `rest` says which of its two."""
        matrix, shard = int(rest.removeprefix("linear_fc")[0]), number % self.granularity
        return matrix_of_expert(dense, matrix, shard, self.granularity, self.gated, self.output_scale)

    def router(self, name: str, dtype: torch.dtype) -> Tensor:
        """[E, h]: a row drawn for each copy, for all of its shards."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        rows = torch.randn(self.num_experts // self.granularity, self.hidden_size, generator=generator)
        return (rows * self.init_std).repeat_interleave(self.granularity, dim=0).to(dtype)


class Upcycled(WholeState):
    """The dense model `state` as a mixture.

    Raises:
        ValueError: it has experts already, or lacks a layer that is to become a mixture.
    """

    def __init__(self, state: WholeState, how: Upcycling) -> None:
        self.state, self.how = state, how
        mixed = sorted(name for name in state if ".mlp.router." in name or ".mlp.experts." in name)
        if mixed:
            raise ValueError(f"the model has experts already: {mixed[0]}")
        self._names: list[str] = []
        found = set()
        for name in state:
            match = _FEED_FORWARD.fullmatch(name)
            if match is None or match["layer"] not in how.layers:
                self._names.append(name)
                continue
            found.add(match["layer"])
            experts = f"{match['layer']}.mlp.experts.local_experts"
            self._names += [f"{experts}.{number}.{match['rest']}" for number in range(how.num_experts)]
        if how.layers - found:
            raise ValueError(f"the model has no feed-forward block in {', '.join(sorted(how.layers - found))}")
        self._names += [f"{layer}{_ROUTER}" for layer in sorted(found)]
        self._names += [f"{layer}{_BIAS}" for layer in sorted(found) if how.expert_bias]
        self._known = set(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def meta(self, name: str) -> Tensor:
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            dense = self.state.meta(f"{expert['mlp']}.{expert['rest']}")
            return self.how.of_expert(dense, int(expert["number"]), expert["rest"])
        return self.state.meta(name) if name in self.state else self.read(name).to("meta")

    def read(self, name: str) -> Tensor:
        how = self.how
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            dense = self.state.read(f"{expert['mlp']}.{expert['rest']}")
            return how.of_expert(dense, int(expert["number"]), expert["rest"])
        if name.endswith(_BIAS):
            return torch.zeros(how.num_experts)
        if name.endswith(_ROUTER):
            block = f"{name.removesuffix(_ROUTER)}.mlp.linear_fc1.weight"
            return how.router(name, self.state.meta(block).dtype)
        return self.state.read(name)
