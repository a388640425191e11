"""Closed sets of names that several parts of the library share."""

from __future__ import annotations

import enum


class ModelType(enum.Enum):
    """How a model's halves are arranged; pipelines of two-part models pass two tensors."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
    retro_encoder = 3
    retro_decoder = 4


class Fp8Recipe(str, enum.Enum):
    """How scales of fp8 are chosen (`TransformerConfig.fp8_recipe`); the names work as well."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    mxfp8 = "mxfp8"
    blockwise = "blockwise"
