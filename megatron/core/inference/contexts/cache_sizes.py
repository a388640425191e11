"""How much a model's layers keep of the tokens and texts they have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core import collectives, device
from megatron.core.utils import get_pg_size


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that one rank keeps."""

    per_token: int
    """Keys and values, or latents, of one token in all layers."""
    per_text: int = 0
    """States of recurrent layers, however long the text."""
    per_encoded_token: int = 0
    """Keys and values of one token of an encoder's output in all layers of the decoder."""


def cache_sizes_of(chunks: Sequence[nn.Module], dtype: torch.dtype, pp_group: ProcessGroup | None = None) -> CacheSizes:
    """What the layers of this rank's model chunks keep; of the stage that keeps most, so that all plan alike.

    Layers say so by a method `cache_bytes(dtype)`, (of a token, of a text), or `encoded_bytes(dtype)`, of a token of
    the encoder. Communicates: an all-reduce of three numbers over the pipeline group.

    Args:
        dtype: of keys and values.
        pp_group: without one, the sizes of this rank.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]

    def told(name: str) -> list[Any]:
        methods = (getattr(module, name, None) for module in modules)
        return [method(dtype) for method in methods if method is not None]

    found, encoded = told("cache_bytes"), sum(told("encoded_bytes"))
    sizes = [sum(of_token for of_token, _ in found), sum(of_text for _, of_text in found), encoded]
    if pp_group is not None and get_pg_size(pp_group) > 1:
        shared = torch.tensor(sizes, device=device.current_device())
        collectives.all_reduce(shared, torch.distributed.ReduceOp.MAX, pp_group, "sizes of the cache")
        sizes = shared.tolist()
    return CacheSizes(*sizes)
