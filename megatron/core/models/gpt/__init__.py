"""Decoder-only language models."""

from __future__ import annotations

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel

__all__ = ["GPTModel", "gpt_layer_specs"]
