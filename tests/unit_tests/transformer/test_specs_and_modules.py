"""Specs, empty parts, and the half-precision wrapper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import (
    Float16Module,
    MegatronModule,
    float16_to_fp32,
    fp32_to_float16,
    param_is_not_shared,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, get_module, import_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks


class Part(nn.Module):
    def __init__(self, size: int, *, scale: float = 1.0, submodules: object = None) -> None:
        super().__init__()
        self.size, self.scale, self.submodules = size, scale, submodules


def a_function() -> str:
    return "called"


def test_build_module() -> None:
    assert build_module(Part, 3).size == 3
    built = build_module(ModuleSpec(module=Part, params={"scale": 2.0}, submodules="parts"), 4)
    assert (built.size, built.scale, built.submodules) == (4, 2.0, "parts")
    assert build_module(a_function) is a_function
    assert build_module(ModuleSpec(module=a_function)) == "called"
    by_path = ModuleSpec(module=("megatron.core.transformer.mlp", "MLP"))
    assert get_module(by_path) is MLP and import_module(("torch.nn", "Linear")) is nn.Linear
    with pytest.raises(TypeError, match="multiple values for keyword argument 'scale'"):
        build_module(ModuleSpec(module=Part, params={"scale": 2.0}), 4, scale=3.0)
    with pytest.raises(AttributeError, match="NoSuchThing"):
        build_module(ModuleSpec(module=("torch.nn", "NoSuchThing")))


def test_identity() -> None:
    assert IdentityOp("anything", config=None)(7, 8) == 7
    assert IdentityFuncOp()(True, False)("x", "residual", 0.1) == "x"


def test_conversions_reach_into_nested_values() -> None:
    nested = (torch.ones(2), [torch.ones(2, dtype=torch.int64), "text"])
    half = fp32_to_float16(nested, lambda t: t.bfloat16())
    assert half[0].dtype == torch.bfloat16 and half[1][0].dtype == torch.int64 and half[1][1] == "text"
    assert float16_to_fp32(half)[0].dtype == torch.float32


def check_float16_module() -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, bf16=True)

    class Inner(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.bfloat16
            return self.linear(x)

    wrapped = Float16Module(config, Inner())
    y = wrapped(torch.randn(2, 4))
    assert y.dtype == torch.float32 and wrapped.module.linear.weight.dtype == torch.bfloat16
    assert set(wrapped.state_dict()) == {"linear.weight", "linear.bias"}
    wrapped.load_state_dict(wrapped.state_dict())
    assert set(wrapped.sharded_state_dict("p.")) == {"p.linear.weight", "p.linear.bias"}


def test_float16_module() -> None:
    run_ranks(1, check_float16_module)


def test_float16_module_needs_a_half_precision() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    with pytest.raises(ValueError, match="one of fp16 and bf16"):
        Float16Module(config, nn.Linear(1, 1))


def test_param_is_not_shared() -> None:
    param = nn.Parameter(torch.ones(1))
    assert param_is_not_shared(param)
    param.shared = True
    assert not param_is_not_shared(param)
