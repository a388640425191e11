"""Llama checkpoints as Meta publishes them: `params.json` and `consolidated.NN.pth`, one file for each of their ranks.

h hidden, a heads, d head width. Their rotary pairs are neighbours, ours are the two halves of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.safe_load import safe_torch_load

from .families.llama import LLAMA
from .families.rope import LLAMA3
from .hf_folder import read_json
from .weights import ModelShape, Weight, interleave_qkv, same, separate_qkv, stacked
from .whole_state import WholeState

_ACROSS = (".wo.weight", ".w2.weight")
"""Cut along inputs; other matrices are cut along outputs, norms not at all."""


def halves_of_pairs(rows: Tensor, head_width: int) -> Tensor:
    """Rows [a d, ...] with each head's pairs of neighbours as two halves."""
    return rows.reshape(-1, head_width // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def pairs_of_halves(rows: Tensor, head_width: int) -> Tensor:
    """Inverse of `halves_of_pairs`."""
    return rows.reshape(-1, 2, head_width // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def weights(shape: ModelShape) -> Iterator[Weight]:
    """Key map of Meta's names."""
    yield same("embedding.word_embeddings.weight", "tok_embeddings.weight")
    for n in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"layers.{n}."
        yield same(f"{ours}input_layernorm.weight", f"{theirs}attention_norm.weight")
        yield _qkv(shape, f"{ours}self_attention.linear_qkv.weight", f"{theirs}attention.")
        yield same(f"{ours}self_attention.linear_proj.weight", f"{theirs}attention.wo.weight")
        yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}ffn_norm.weight")
        gate_and_up = (f"{theirs}feed_forward.w1.weight", f"{theirs}feed_forward.w3.weight")
        yield stacked(f"{ours}mlp.linear_fc1.weight", *gate_and_up)
        yield same(f"{ours}mlp.linear_fc2.weight", f"{theirs}feed_forward.w2.weight")
    yield same("decoder.final_layernorm.weight", "norm.weight")
    yield same("output_layer.weight", "output.weight")


def _qkv(shape: ModelShape, ours: str, theirs: str) -> Weight:
    width = shape.kv_channels

    def pack(parts: list[Tensor]) -> Tensor:
        q, k, v = parts
        return interleave_qkv([halves_of_pairs(q, width), halves_of_pairs(k, width), v], shape)

    def unpack(whole: Tensor) -> list[Tensor]:
        q, k, v = separate_qkv(whole, shape)
        return [pairs_of_halves(q, width), pairs_of_halves(k, width), v]

    return Weight(ours, tuple(f"{theirs}w{part}.weight" for part in "qkv"), pack, unpack)


class MetaState(WholeState):
    """A directory of Meta's under our names.

    Raises:
        CheckpointingException: files are missing, damaged, or not of this kind.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.params: dict[str, Any] = read_json(self.directory / "params.json")
        paths = sorted(self.directory.glob("consolidated.*.pth"))
        if not paths:
            raise CheckpointingException(f"{directory} has no consolidated.NN.pth")
        self._files: list[dict[str, Tensor]] = [safe_torch_load(path, mmap=True) for path in paths]
        absent = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in self.params]
        if absent:
            raise CheckpointingException(f"{directory}/params.json lacks {', '.join(absent)}")
        self.settings = self._settings()
        self._weights = {weight.ours: weight for weight in weights(ModelShape.of_settings(self.settings))}

    def _settings(self) -> dict[str, Any]:
        params = self.params
        scaling = {"rope_type": "llama3", "factor": params.get("rope_scale_factor", 8.0), **LLAMA3}
        config = {
            "num_hidden_layers": params["n_layers"],
            "hidden_size": params["dim"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads"),
            "intermediate_size": self._whole("layers.0.feed_forward.w1.weight", meta=True).size(0),
            "rms_norm_eps": params["norm_eps"],
            "rope_theta": params.get("rope_theta", 10000.0),
            "rope_scaling": scaling if params.get("use_scaled_rope") else None,
            "tie_word_embeddings": False,
        }
        return LLAMA.settings(config)

    def _whole(self, name: str, meta: bool = False) -> Tensor:
        try:
            parts = [file[name].to("meta") if meta else file[name] for file in self._files]
        except KeyError:
            raise CheckpointingException(f"{self.directory} lacks {name}") from None
        if parts[0].dim() == 1 or len(parts) == 1:
            return parts[0]
        embedding = name.startswith("tok_embeddings.")  # by hidden units, in later releases by words
        across = name.endswith(_ACROSS) or embedding and parts[0].size(1) != self.params["dim"]
        return torch.cat(parts, 1 if across else 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def meta(self, name: str) -> Tensor:
        weight = self._weights[name]
        return weight.pack([self._whole(part, meta=True) for part in weight.theirs])

    def read(self, name: str) -> Tensor:
        weight = self._weights[name]
        return weight.pack([self._whole(part) for part in weight.theirs])
