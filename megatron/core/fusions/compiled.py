"""The arithmetic between matrix products and communication, written plainly and compiled by `torch.compile`.

A region is a function of tensors, weights among them, and of a few settings: all layers share it, and it is compiled
once for each combination of types, dimensions and settings. No region communicates, so that none is cut in two by a
collective; matrix products, attention kernels and everything with a gradient of its own stay outside.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.device import device_type
from megatron.core.fusions.dropout import dropout

BACKEND = "inductor"
"""Compiler of the regions; tests take one that needs no C++."""

FORMS = 64
"""Combinations that one region may be compiled for, beyond torch's default of 8: half of them are for recompute."""


def compiles(*functions: Callable[..., Any]) -> bool:
    """Whether all `functions` are worth compiling on this device."""
    return device_type() != "cpu" or not any(function in SLOWER_ON_CPU for function in functions)


def region(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled; the same object each time."""
    return _compiled(function, BACKEND)


def sweep(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, which changes flat tensors in place, compiled for any number of elements; always the same object."""
    return _compiled(function, BACKEND, dynamic=True)


@cache
def _compiled(function: Callable[..., Any], backend: str, dynamic: bool | None = None) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    # Random numbers come from torch's own generator: dropout drops what it drops without compilation.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic, options=options)


def why_not_compilable(device_type: str, environment: Mapping[str, str]) -> str | None:
    """What `torch.compile` lacks on this machine and how to get it; None where nothing is missing."""
    compiler = environment.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return (
            f"a C++ compiler: {compiler} is not on the PATH. Install one (apt-get install g++, dnf install gcc-c++, "
            "conda install gxx) or name it in the environment variable CXX"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the headers of Python (Python.h). Install them (apt-get install python3-dev, dnf install python3-devel)"
    if device_type == "cuda" and find_spec("triton") is None:
        return "triton. Install it (pip install triton, in the version that this torch names)"
    return None


# --- the regions ---


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """LayerNorm with statistics in fp32, in the type of the weight."""
    gain = weight.float() + 1.0 if zero_centered else weight.float()
    return F.layer_norm(x.float(), (x.size(-1),), gain, bias.float(), eps).to(weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """RMSNorm with statistics in fp32, in the type of the weight."""
    gain = weight.float() + 1.0 if zero_centered else weight.float()
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(weight.dtype)


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, probability: float, training: bool) -> Tensor:
    """residual + dropout(x + bias)."""
    return residual + dropout(x if bias is None else x + bias, probability, training)


@cache
def added_norm(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The region (`bias_dropout_add` of its first five arguments, `norm` of that and of the others): the sum is written
    once, and not read again for the norm."""

    def add_and_norm(
        x: Tensor, bias: Tensor | None, residual: Tensor, probability: float, training: bool, *others: Any
    ) -> tuple[Tensor, Tensor]:
        total = bias_dropout_add(x, bias, residual, probability, training)
        return total, norm(total, *others)

    return add_and_norm


SLOWER_ON_CPU: tuple[Callable[..., Any], ...] = (layer_norm, bias_dropout_add)
"""Regions that torch's own kernels for the CPU do faster (docs/performance.md)."""


def rotate(t: Tensor, angles: Tensor, mscale: float, interleaved: bool) -> Tensor:
    """The first r channels of t [s, b, a, d] rotated in pairs by angles [s, 1 or b, 1, r/2], the rest as they are."""
    cos, sin = angles.cos() * mscale, angles.sin() * mscale
    width = 2 * angles.size(-1)
    wide = t[..., :width].float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(t.dtype), t[..., width:]), dim=-1)


@cache
def activation(function: Callable[[Tensor], Tensor], gated: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The region `function(x + bias)`, gated: `function(first half) * second half`."""

    def activate(x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            x = x + bias
        if not gated:
            return function(x)
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up

    return activate
