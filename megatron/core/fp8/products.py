"""The three products of a linear layer with fp8 operands: y = x Wᵀ + b, dx = dy W, dW = dyᵀ x.

Each operand is quantized along the dimension that its product sums over, from the values in the model's own type.
Sums are fp32; y and dx are rounded to that type, dW goes to its accumulator in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_reduce
from megatron.core.device import is_cpu
from megatron.core.fp8.delayed import OPERANDS, DelayedScales
from megatron.core.fp8.quantization import (
    Quantized,
    largest_magnitude,
    quantize_blocks,
    quantize_tensor,
    scale_for,
)
from megatron.core.fp8.recipes import Recipe
from megatron.core.fp8.scaled_product import scaled_product
from megatron.core.fusions.compiled import region
from megatron.core.tensor_parallel.gemm import LinearProducts, weight_gradient

X, WEIGHT, GRAD = range(len(OPERANDS))
WEIGHT_TYPE = torch.float8_e4m3fn


@dataclass
class Gradient:
    """dy, and what has been made of it for both of its products."""

    plain: Tensor
    """[..., out]."""
    quantized: Quantized | None = field(default=None)
    """[n, out] with one scale, which serves both."""


class Fp8Products(LinearProducts):
    """The products of one weight [out, in].

    Args:
        groups: for each of x, W and dy, the ranks that hold its parts: one scale for a whole tensor follows from the
            maximum over them. Communicates: an all-reduce of one number for each (where scales are not delayed).
        is_expert: the weight is one of an expert.
    """

    def __init__(self, recipe: Recipe, groups: Sequence[Sequence[ProcessGroup]], is_expert: bool = False) -> None:
        self.recipe, self.groups = recipe, groups
        self.types = (torch.float8_e4m3fn, WEIGHT_TYPE, recipe.gradient_type)
        self.delayed = DelayedScales(recipe, self.types, is_expert) if recipe.scaling.delayed else None
        self.learns = True
        self.kept_scale: Tensor | None = None
        """Of a weight that is kept in fp8."""

    def for_evaluation(self) -> Fp8Products:
        if self.delayed is None:
            return self
        same = copy.copy(self)
        same.learns = False
        return same

    def state(self) -> dict[str, Tensor] | None:
        return None if self.delayed is None else self.delayed.state()

    def load(self, state: dict[str, Tensor]) -> None:
        if self.delayed is not None and "amax_history" in state:
            self.delayed.load(state)

    def keep_weight(self, magnitude: Tensor) -> Tensor:
        """The scale of a weight that is cast now and then used as it is; only for one scale a tensor.

        Args:
            magnitude: max |W| over all ranks.
        """
        if self.delayed is not None:
            self.delayed.seen[WEIGHT] = magnitude
        self.kept_scale = self._scale_of(WEIGHT, magnitude, among=()).clone()
        return self.kept_scale

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        a, b = self._quantized(X, _rows(x)), self._quantized(WEIGHT, weight)
        return scaled_product(a, b, x.dtype, bias, exact_sums=False).view(*x.shape[:-1], weight.size(0))

    def gradient(self, grad_output: Tensor) -> Gradient:
        shared = self.recipe.scaling.activations is None
        return Gradient(grad_output, self._quantized(GRAD, _rows(grad_output)) if shared else None)

    def input_gradient(self, gradient: Gradient, weight: Tensor) -> Tensor:
        dy = gradient.plain
        a = gradient.quantized or self._quantized(GRAD, _rows(dy))
        b = self._quantized(WEIGHT, weight, across=True)
        return scaled_product(a, b, dy.dtype).view(*dy.shape[:-1], weight.size(1))

    def weight_gradient(self, weight: Tensor, gradient: Gradient, x: Tensor, accumulate: bool) -> Tensor | None:
        dy = gradient.plain
        if not self.recipe.weight_gradients:
            return weight_gradient(weight, dy, x, accumulate)
        total = getattr(weight, "main_grad", None) if accumulate else None
        of_dy = gradient.quantized
        a = self._quantized(GRAD, _rows(dy), across=True) if of_dy is None else of_dy.transposed()
        b = self._quantized(X, _rows(x), across=True)
        if total is None:
            return scaled_product(a, b, dy.dtype)
        total.add_(scaled_product(a, b, torch.float32).view(total.shape))
        return None

    def _quantized(self, operand: int, x: Tensor, across: bool = False) -> Quantized:
        """`x` [m, k] for a product that sums over k, or, `across`, its transpose for one that sums over m."""
        if operand == WEIGHT and x.dtype == WEIGHT_TYPE:
            assert self.kept_scale is not None
            kept = Quantized(x, self.kept_scale, None, power_of_two=False)
            return kept.transposed() if across else kept
        scaling = self.recipe.scaling
        block, dtype = scaling.weights if operand == WEIGHT else scaling.activations, self.types[operand]
        if block is not None:
            return quantize_blocks(x.t() if across else x, dtype, block, scaling.power_of_two, self.run)
        quantized = quantize_tensor(x, dtype, self._scale(operand, x), self.run)
        return quantized.transposed() if across else quantized

    def _scale(self, operand: int, x: Tensor) -> Tensor:
        """The one of the whole tensor."""
        delayed = self.delayed
        if delayed is None:
            return self._scale_of(operand, self.run(largest_magnitude)(x), self.groups[operand])
        if not self.learns and delayed.known[operand]:
            return delayed.scales[operand]
        magnitude = self.run(largest_magnitude)(x)
        if self.learns:
            delayed.note(operand, magnitude)
        return self._scale_of(operand, magnitude, self.groups[operand])

    def _scale_of(self, operand: int, magnitude: Tensor, among: Sequence[ProcessGroup]) -> Tensor:
        """The one that earlier steps left, or, without any, that of the largest of the magnitudes of all ranks."""
        if self.delayed is not None and self.delayed.known[operand]:
            return self.delayed.scales[operand]
        for group in among:
            magnitude = magnitude.clone()
            all_reduce(magnitude, torch.distributed.ReduceOp.MAX, group=group, what="a maximum for fp8")
        return scale_for(magnitude, self.types[operand], margin=self.recipe.margin if self.delayed else 0)

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled on an accelerator: one by one, the steps of a cast are passes over memory that take longer than what
        the product gains."""
        return function if is_cpu() else region(function)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))
