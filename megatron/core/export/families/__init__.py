"""The families of models that are known on both sides, and finding the one that a model is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import Family, NotExpressible
from .bert import BERT, MEGATRON_BERT
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .gpt2 import GPT2
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3
from .mamba2 import MAMBA2
from .mixtral import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from .t5 import T5

_ALL = (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    BERT,
    MEGATRON_BERT,
    T5,
    MAMBA2,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
"""`model_type` -> family. Where a model of ours is of several, the first one stands for them."""


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        NotExpressible: none of those that are known.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise NotExpressible(f"model_type {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of_settings(settings: Mapping[str, Any], model_type: str | None = None) -> Family:
    """The family of a model of ours.

    Args:
        settings: under the names of the programs' flags.
        model_type: take this family, or raise if the model is not of it.

    Raises:
        NotExpressible: the model is of none; the message has the reasons.
    """
    ours = settings.get("model_family") or "gpt"
    if model_type is not None and model_type not in FAMILIES:
        raise NotExpressible(f"{model_type!r} is not known; known are {', '.join(FAMILIES)}")
    reasons = []
    for family in FAMILIES.values():
        if family.our_type != ours or model_type not in (None, family.model_type):
            continue
        misfits = family.misfits(settings)
        if not misfits:
            return family
        reasons.append((len(misfits), f"no {family.model_type} since {', '.join(misfits)}"))
    lines = [line for _, line in sorted(reasons)]
    kind = f"{ours} model of type {model_type}" if model_type else f"{ours} model"
    raise NotExpressible("\n  ".join([f"no class of transformers computes this {kind}:", *lines]))


__all__ = ["FAMILIES", "family_of_config", "family_of_settings"]
