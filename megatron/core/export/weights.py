"""How one parameter here and parameters elsewhere hold the same numbers: the rows of a family's key map.

Whole tensors only; a row is read both ways, and on tensors of the device `meta` too, which gives shapes and types
without data. h hidden, a heads, g query groups, d head width, f feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core.transformer.transformer_config import TransformerConfig

StateDict = dict[str, Tensor]
KINDS = ("weight", "bias")


class HeadShape(Protocol):
    """How the rows of a fused query/key/value weight are grouped."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int | None: ...
    @property
    def kv_channels(self) -> int | None: ...


def is_gated(settings: Mapping[str, Any]) -> bool:
    """Whether a second projection gates the first one of a feed-forward block, by the names of the programs' flags."""
    return bool(settings.get("swiglu") or settings.get("geglu"))


def pattern_of_layers(moe_layer_freq: int | list[int] | None, num_layers: int) -> list[bool]:
    """Which layers are mixtures of experts, by `--moe-layer-freq`."""
    freq = moe_layer_freq or 1
    return [layer % freq == 0 for layer in range(num_layers)] if isinstance(freq, int) else list(map(bool, freq))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides which parameters a model has, and how their rows are grouped."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    encoder_num_layers: int | None = None
    """Of an encoder-decoder model, whose `num_layers` are the decoder's."""
    add_bias_linear: bool = True
    add_qkv_bias: bool = True
    gated: bool = False
    """The feed-forward block has a second projection that gates the first."""
    qk_layernorm: bool = False
    tied: bool = True
    """The output weight is the embedding's."""
    num_tokentypes: int = 0
    binary_head: bool = False
    num_experts: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_router_enable_expert_bias: bool = False
    moe_shared_expert_gate: bool = False
    q_lora_rank: int | None = None
    """Of latent attention, whose queries come from a latent too."""

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is a mixture of experts."""
        return bool(self.num_experts) and pattern_of_layers(self.moe_layer_freq, self.num_layers)[layer]

    @classmethod
    def of_config(cls, config: TransformerConfig, **others: Any) -> ModelShape:
        """Of a library configuration; `others` are what that does not know."""
        values = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        found = {**values, "gated": config.gated_linear_unit, "num_experts": config.num_moe_experts}
        return cls(**{**found, **others})

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> ModelShape:
        """Of a program's settings, under the names of its flags; also of those that a checkpoint has kept.

        Raises:
            KeyError: the depth, width or number of heads is missing.
        """
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        grouped = settings.get("group_query_attention") and settings.get("num_query_groups")
        biased = settings.get("add_bias_linear", True)
        return cls(
            num_layers=settings.get("decoder_num_layers") or settings["num_layers"],
            encoder_num_layers=settings.get("encoder_num_layers"),
            num_attention_heads=heads,
            num_query_groups=settings["num_query_groups"] if grouped else heads,
            kv_channels=settings.get("kv_channels") or hidden // heads,
            add_bias_linear=biased,
            add_qkv_bias=biased or bool(settings.get("add_qkv_bias")),
            gated=is_gated(settings),
            qk_layernorm=bool(settings.get("qk_layernorm")),
            tied=not settings.get("untie_embeddings_and_output_weights"),
            num_tokentypes=2 if settings.get("bert_binary_head") else 0,
            binary_head=bool(settings.get("bert_binary_head")),
            num_experts=settings.get("num_experts"),
            moe_layer_freq=settings.get("moe_layer_freq") or 1,
            moe_router_enable_expert_bias=bool(settings.get("moe_router_enable_expert_bias")),
            moe_shared_expert_gate=bool(settings.get("moe_shared_expert_gate")),
            q_lora_rank=settings.get("q_lora_rank"),
        )


@dataclass(frozen=True)
class Weight:
    """One parameter here, the parameters there that hold the same numbers, and how to go from one to the
    other."""

    ours: str
    theirs: tuple[str, ...]
    pack: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]
    """Theirs to ours."""
    unpack: Callable[[Tensor], list[Tensor]] = lambda whole: [whole]
    """Ours to theirs."""


# --- ways of storing ------------------------------------------------------------------------------------


def same(ours: str, theirs: str) -> Weight:
    """The same tensor under another name."""
    return Weight(ours, (theirs,))


def transposed(ours: str, theirs: str) -> Weight:
    """Inputs first there, outputs first here."""
    return Weight(ours, (theirs,), lambda parts: parts[0].t().contiguous(), lambda whole: [whole.t().contiguous()])


def stacked(ours: str, *theirs: str) -> Weight:
    """Several matrices there, below each other here."""
    return Weight(ours, theirs, torch.cat, lambda whole: list(whole.chunk(len(theirs))))


def interleave_qkv(parts: list[Tensor], shape: HeadShape) -> Tensor:
    """Rows of q [a d, ...], k and v [g d, ...] in our order: for each query group its queries, its key, its
    value."""
    g = shape.num_query_groups
    assert g is not None
    grouped = [part.reshape(g, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def separate_qkv(whole: Tensor, shape: HeadShape) -> list[Tensor]:
    """Inverse of `interleave_qkv`."""
    g, d = shape.num_query_groups, shape.kv_channels
    assert g is not None and d is not None
    grouped = whole.reshape(g, -1, *whole.shape[1:])
    widths = (shape.num_attention_heads // g * d, d, d)
    return [part.flatten(0, 1) for part in grouped.split(widths, dim=1)]


def fused_qkv(shape: HeadShape, ours: str, *theirs: str) -> Weight:
    """Their query, key and value, one parameter of ours."""
    return Weight(
        ours,
        theirs,
        lambda parts: interleave_qkv(parts, shape),
        lambda whole: separate_qkv(whole, shape),
    )


def interleave_heads(parts: list[Tensor], heads: int) -> Tensor:
    """Rows of several [a d, ...] tensors in turns: for each head its rows of the first, of the second, ..."""
    return torch.cat([part.reshape(heads, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


def fused_heads(heads: int, ours: str, *theirs: str) -> Weight:
    """Their projections of equal size (key and value of cross attention), one parameter of ours, head by head."""

    def unpack(whole: Tensor) -> list[Tensor]:
        by_head = whole.reshape(heads, -1, *whole.shape[1:])
        return [part.flatten(0, 1) for part in by_head.chunk(len(theirs), dim=1)]

    return Weight(ours, theirs, lambda parts: interleave_heads(parts, heads), unpack)


# --- whole dictionaries ---------------------------------------------------------------------------------


def from_hf(weights: Iterable[Weight], theirs: Mapping[str, Tensor]) -> StateDict:
    """Our whole tensors by our names.

    Raises:
        ValueError: names are missing.
    """
    table = list(weights)
    require_names({name for weight in table for name in weight.theirs}, theirs)
    return {weight.ours: weight.pack([theirs[name] for name in weight.theirs]) for weight in table}


def to_hf(weights: Iterable[Weight], ours: Mapping[str, Tensor]) -> StateDict:
    """Their tensors by their names.

    Raises:
        ValueError: names are missing.
    """
    table = list(weights)
    require_names({weight.ours for weight in table}, ours)
    return {name: tensor for weight in table for name, tensor in zip(weight.theirs, weight.unpack(ours[weight.ours]))}


def require_names(names: set[str], state: Any) -> None:
    """Raise `ValueError` if `state` lacks some of the names."""
    missing = sorted(name for name in names if name not in state)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}")
