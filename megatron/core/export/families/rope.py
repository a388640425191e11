"""Rotary positions as config.json describes them: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..family import NotExpressible, require

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What `--use-rope-scaling` means."""
OFF: dict[str, Any] = {
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "yarn_rotary_scaling_factor": None,
    "yarn_original_max_position_embeddings": None,
}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings.

    Raises:
        NotExpressible: the positions are stretched in a way that is not built.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind not in _READERS:
        raise NotExpressible(f"rope_type {kind!r} is not built; built are {', '.join(_READERS)}")
    common = {"rotary_base": plain_number(theta), "rotary_percent": float(share), "rotary_interleaved": False}
    return {**common, **OFF, "position_embedding_type": "rope", **_READERS[kind](scaling)}


def _read_llama3(scaling: Mapping[str, Any]) -> dict[str, Any]:
    other = [f"{key} {scaling.get(key)} (not {value})" for key, value in LLAMA3.items() if scaling.get(key) != value]
    require(not other, f"rope_type llama3 with {', '.join(other)} is not built")
    return {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}


def _read_yarn(scaling: Mapping[str, Any]) -> dict[str, Any]:
    factor, temperature = float(scaling["factor"]), scaling.get("attention_factor")
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    require(temperature is None or math.isclose(temperature, usual), f"yarn with attention_factor {temperature}")
    require(scaling.get("truncate", True), "yarn with truncate false is not built")
    given = [key for key in ("mscale", "mscale_all_dim") if scaling.get(key)]
    require(not given, f"yarn with {' and '.join(given)} is not built")
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "yarn_beta_fast": float(scaling.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(scaling.get("beta_slow") or 1.0),
    }


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "default": lambda scaling: {},
    "linear": lambda scaling: {"rotary_seq_len_interpolation_factor": plain_number(scaling["factor"])},
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}


def write_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Their keys: the present one, and those that older releases read.

    Raises:
        NotExpressible: positions are not rotary, or their pairs are interleaved.
    """
    kind = settings.get("position_embedding_type")
    if settings.get("use_rotary_position_embeddings") and kind == "learned_absolute":
        kind = "rope"
    require(kind in ("rope", "yarn"), f"position_embedding_type is {kind!r}, not 'rope'")
    require(not settings.get("rotary_interleaved"), "rotary_interleaved is set")
    require(settings.get("rotary_percent", 1.0) == 1.0, f"rotary_percent is {settings.get('rotary_percent')}")
    theta, scaling = float(settings.get("rotary_base", 10000)), _scaling(settings, kind == "yarn")
    older = {"rope_theta": theta, "rope_scaling": scaling or None}
    return {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}, **older}


def _scaling(settings: Mapping[str, Any], yarn: bool) -> dict[str, Any]:
    stretch = settings.get("rotary_seq_len_interpolation_factor")
    require(not (stretch and (yarn or settings.get("use_rope_scaling"))), "positions are stretched in two ways")
    if yarn:
        mscale, of_all = settings.get("yarn_mscale", 1.0), settings.get("yarn_mscale_all_dim", 0.0)
        require((mscale, of_all) == (1.0, 0.0), f"yarn_mscale {mscale} and yarn_mscale_all_dim {of_all}")
        return {
            "rope_type": "yarn",
            "factor": settings["yarn_rotary_scaling_factor"],
            "original_max_position_embeddings": settings["yarn_original_max_position_embeddings"],
            "beta_fast": settings.get("yarn_beta_fast", 32.0),
            "beta_slow": settings.get("yarn_beta_slow", 1.0),
        }
    if settings.get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": settings.get("rope_scaling_factor", 8.0), **LLAMA3}
    return {"rope_type": "linear", "factor": float(stretch)} if stretch else {}


def plain_number(value: float) -> int | float:
    """Without a fraction of zero, as flags have it."""
    return int(value) if value == int(value) else float(value)
