"""Transformer layers. The names below are loaded on first use, so that a configuration alone imports
quickly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule as MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec as ModuleSpec
    from megatron.core.transformer.spec_utils import build_module as build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig as MLATransformerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig as TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer as TransformerLayer
    from megatron.core.transformer.transformer_layer import (
        TransformerLayerSubmodules as TransformerLayerSubmodules,
    )

_HOME_OF_NAME = {
    "MLATransformerConfig": "transformer_config",
    "MegatronModule": "module",
    "ModuleSpec": "spec_utils",
    "TransformerConfig": "transformer_config",
    "TransformerLayer": "transformer_layer",
    "TransformerLayerSubmodules": "transformer_layer",
    "build_module": "spec_utils",
}

__all__ = list(_HOME_OF_NAME)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF_NAME[name]}"), name)
