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

    Raises:
        NotImplementedError: the kept tensor is to be stored in fp8 or on the host.
    """
    if fp8_input_store or cpu_offload_input:
        raise NotImplementedError("activation_func_fp8_input_store and cpu_offloading are not built for SwiGLU yet")
    return GatedActivation.apply(input, bias, torch.nn.functional.silu, _silu_backward)


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
