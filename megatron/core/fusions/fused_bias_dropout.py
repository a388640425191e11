"""y = residual + dropout(x + bias): how each half of a transformer layer returns to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron.core.fusions.compiled import bias_dropout_add, region
from megatron.core.fusions.dropout import dropout

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def _bias_dropout_add(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float, training: bool
) -> Tensor:
    """residual + dropout(x + bias), in the wider type of the two (an fp32 residual stream stays fp32)."""
    x, bias = x_with_bias
    if bias is not None:
        x = x + bias
        if (prob == 0.0 or not training) and x.dtype == residual.dtype:
            return x.add_(residual)  # in place: x is new here, and no backward reads it
    return residual + dropout(x, prob, training)


def bias_dropout_add_unfused(training: bool) -> BiasDropoutAdd:
    """The function (x_with_bias, residual, prob) -> residual + dropout(x + bias)."""

    return partial(_bias_dropout_add, training=training)


def bias_dropout_add_fused_train(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
    """residual + dropout(x + bias) with dropout on."""
    return _bias_dropout_add(x_with_bias, residual, prob, True)


def bias_dropout_add_fused_inference(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """residual + x + bias: dropout is off."""
    return _bias_dropout_add(x_with_bias, residual, prob, False)


def _bias_dropout_add_compiled(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float, training: bool
) -> Tensor:
    x, bias = x_with_bias
    return region(bias_dropout_add)(x, bias, residual, prob, training)


def get_compiled_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """As `get_bias_dropout_add`, by a function that `torch.compile` makes."""
    return partial(_bias_dropout_add_compiled, training=training)


def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """The function for training or inference; `fused` chooses between two forms of the same arithmetic."""
    if not fused:
        return bias_dropout_add_unfused(training)
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference
