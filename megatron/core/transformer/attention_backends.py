"""The attention core that `config.attention_backend` asks for."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.core_attention import CoreAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.flash_attention import FlashAttention
from megatron.core.transformer.sdpa_attention import SDPAttention
from megatron.core.transformer.transformer_config import TransformerConfig

CORE_OF_BACKEND: dict[AttnBackend, type[CoreAttention]] = {
    AttnBackend.auto: FlashAttention,
    AttnBackend.flash: FlashAttention,
    AttnBackend.fused: SDPAttention,
    AttnBackend.unfused: DotProductAttention,
    AttnBackend.local: DotProductAttention,
}


def build_core_attention(config: TransformerConfig, **kwargs: Any) -> CoreAttention:
    """The core for `config.attention_backend`, chosen once, when the layer is built.

    `auto` and `flash` take fused CUDA kernels where they fit and torch's SDPA elsewhere, `fused` is SDPA
    always, `unfused` and `local` write the scores out.
    """
    return CORE_OF_BACKEND[config.attention_backend](config, **kwargs)
