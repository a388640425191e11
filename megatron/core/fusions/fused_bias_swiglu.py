"""silu(a) * b of x + bias = [a ; b] (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.fusions.fused_gated_activation import GatedActivation


def swiglu(y: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = y.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def bias_swiglu(y: Tensor, bias: Tensor) -> Tensor:
    """`swiglu` of y + bias."""
    return swiglu(y + bias)


def bias_swiglu_impl(
    input: Tensor, bias: Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> Tensor:
    """`swiglu` of input + bias, keeping one tensor for backward; input [..., 2f] -> [..., f].

    Args:
        fp8_input_store: keep it in fp8.
        cpu_offload_input: says nothing new here: where `cpu_offloading` puts a layer's activations away, this one goes
            with the others.

    Raises:
        NotImplementedError: the kept tensor is to be stored in fp8.
    """
    if fp8_input_store:
        raise NotImplementedError("activation_func_fp8_input_store is not built yet")
    return GatedActivation.apply(input, bias, torch.nn.functional.silu, _silu_backward)


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
