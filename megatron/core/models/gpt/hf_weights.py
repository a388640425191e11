"""Weights of a GPT under the names of Hugging Face transformers: one key map for each model family, read both
ways.

Whole tensors only, and plain dictionaries: no package of theirs is needed. `load_whole_state` cuts whole
tensors for the layout of a model. h hidden, a heads, g query groups, d head width, f feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size

StateDict = dict[str, Tensor]


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


def _transposed(ours: str, theirs: str) -> Weight:
    return Weight(ours, (theirs,), lambda parts: parts[0].t().contiguous(), lambda whole: [whole.t().contiguous()])


def _stacked(ours: str, *theirs: str) -> Weight:
    """Several matrices below each other."""
    return Weight(ours, theirs, torch.cat, lambda whole: list(whole.chunk(len(theirs))))


def interleave_qkv(parts: list[Tensor], config: TransformerConfig) -> Tensor:
    """Rows of q [a d, ...], k and v [g d, ...] in our order: for each query group its queries, its key, its
    value."""
    g, d = config.num_query_groups, config.kv_channels
    assert g is not None and d is not None
    grouped = [part.reshape(g, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def separate_qkv(whole: Tensor, config: TransformerConfig) -> list[Tensor]:
    """Inverse of `interleave_qkv`."""
    g, d = config.num_query_groups, config.kv_channels
    assert g is not None and d is not None
    grouped = whole.reshape(g, -1, *whole.shape[1:])
    widths = (config.num_attention_heads // g * d, d, d)
    return [part.flatten(0, 1) for part in grouped.split(widths, dim=1)]


def fused_qkv(config: TransformerConfig, ours: str, *theirs: str) -> Weight:
    """Their query, key and value, one parameter of ours."""
    return Weight(
        ours,
        theirs,
        lambda parts: interleave_qkv(parts, config),
        lambda whole: separate_qkv(whole, config),
    )


def _gpt2_qkv(config: TransformerConfig, ours: str, theirs: str) -> Weight:
    """GPT-2 stores [q ; k ; v] side by side, its matrices transposed."""

    def pack(parts: list[Tensor]) -> Tensor:
        rows = parts[0].t() if parts[0].dim() == 2 else parts[0]
        return interleave_qkv(list(rows.chunk(3)), config)

    def unpack(whole: Tensor) -> list[Tensor]:
        rows = torch.cat(separate_qkv(whole, config))
        return [rows.t().contiguous() if rows.dim() == 2 else rows]

    return Weight(ours, (theirs,), pack, unpack)


# --- families -------------------------------------------------------------------------------------------


def gpt2_weights(config: TransformerConfig) -> Iterator[Weight]:
    """GPT-2: tied embeddings, learned positions, tanh GELU, biases everywhere."""
    yield Weight("embedding.word_embeddings.weight", ("transformer.wte.weight",))
    yield Weight("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
    for n in range(config.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"transformer.h.{n}."
        for kind in ("weight", "bias"):
            yield Weight(f"{ours}input_layernorm.{kind}", (f"{theirs}ln_1.{kind}",))
            yield Weight(f"{ours}pre_mlp_layernorm.{kind}", (f"{theirs}ln_2.{kind}",))
            yield _gpt2_qkv(config, f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.c_attn.{kind}")
        for our_name, their_name in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc1", "mlp.c_fc"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            yield _transposed(f"{ours}{our_name}.weight", f"{theirs}{their_name}.weight")
            yield Weight(f"{ours}{our_name}.bias", (f"{theirs}{their_name}.bias",))
    for kind in ("weight", "bias"):
        yield Weight(f"decoder.final_layernorm.{kind}", (f"transformer.ln_f.{kind}",))


def llama_weights(config: TransformerConfig, tied: bool = False) -> Iterator[Weight]:
    """Llama 1 to 3, Mistral, Yi, and, with `add_qkv_bias`, Qwen2: RMSNorm, SwiGLU, rotary halves, no other
    bias.

    Args:
        tied: the output weight is the embedding's.
    """
    yield Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    for n in range(config.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        yield Weight(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",))
        yield Weight(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",))
        for kind in ("weight", "bias") if config.add_qkv_bias or config.add_bias_linear else ("weight",):
            names = [f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"]
            yield fused_qkv(config, f"{ours}self_attention.linear_qkv.{kind}", *names)
        yield Weight(f"{ours}self_attention.linear_proj.weight", (f"{theirs}self_attn.o_proj.weight",))
        gate_and_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        yield _stacked(f"{ours}mlp.linear_fc1.weight", *gate_and_up)
        yield Weight(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",))
    yield Weight("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not tied:
        yield Weight("output_layer.weight", ("lm_head.weight",))


def from_hf(weights: Iterator[Weight], theirs: StateDict) -> StateDict:
    """Our whole tensors by our names.

    Raises:
        ValueError: names are missing.
    """
    table = list(weights)
    _require({name for weight in table for name in weight.theirs}, theirs)
    return {weight.ours: weight.pack([theirs[name] for name in weight.theirs]) for weight in table}


def to_hf(weights: Iterator[Weight], ours: StateDict) -> StateDict:
    """Their tensors by their names.

    Raises:
        ValueError: names are missing.
    """
    table = list(weights)
    _require({weight.ours for weight in table}, ours)
    return {name: tensor for weight in table for name, tensor in zip(weight.theirs, weight.unpack(ours[weight.ours]))}


def _require(names: set[str], state: StateDict) -> None:
    missing = sorted(names - state.keys())
    if missing:
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}")


# --- into a model ---------------------------------------------------------------------------------------

_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


@torch.no_grad()
def load_whole_state(model: LanguageModule, state: StateDict) -> None:
    """Fill this rank's part of `model` from whole tensors; rows of padded vocabulary become zero.

    Raises:
        ValueError: a tensor is missing or has another shape than the model.
    """
    names = {name: model.global_parameter_name(name) for name, _ in model.named_parameters()}
    _require(set(names.values()), state)
    group = model.model_comm_pgs.tp
    for name, param in model.named_parameters():
        whole = state[names[name]]
        if names[name] in _OF_VOCABULARY:
            rows = whole.new_zeros(model.vocab_size - whole.size(0), *whole.shape[1:])
            whole = torch.cat([whole, rows])
        local = shard_of(whole, param, get_pg_rank(group), get_pg_size(group))
        if local.shape != param.shape:
            raise ValueError(f"{names[name]}: given {list(whole.shape)}, whose part does not fit {list(param.shape)}")
        param.copy_(local)


def shard_of(whole: Tensor, param: Tensor, rank: int, size: int) -> Tensor:
    """The part of `whole` that the parameter holds on tensor parallel rank `rank` of `size`."""
    if not getattr(param, "tensor_model_parallel", False):
        return whole
    dim, stride = param.partition_dim, param.partition_stride  # type: ignore[attr-defined]
    return torch.cat(whole.chunk(stride * size, dim)[rank::size], dim)
