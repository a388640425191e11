"""Run code that was written for float32 in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """While this mode is on, every float32 that code asks torch for is a float64, in backward too.

    The model, the loss, the buffers and the optimizer stay the ones that train; what differs is the type in which they
    compute. So a deviation from a run in this mode is what rounding to float32 (or a mistake) has made of the same
    formulas.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_paused = False

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, float32 is float32: for the initial weights, which are defined in it."""
        self._is_paused = True
        torch.set_default_dtype(self._default)
        try:
            yield
        finally:
            self._is_paused = False
            torch.set_default_dtype(torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func in (torch.Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **kwargs)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    def _backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, **others: Any
    ) -> None:
        """`torch.autograd.backward`, with the mode on: it is off inside what it intercepts, and backward runs code of
        ours that asks for float32, too."""
        if others.get("create_graph") or others.get("inputs"):
            raise NotImplementedError("create_graph and inputs are not supported in float64")
        tensors = _as_tuple(tensors)
        grads = _as_tuple(others.get("gradient", grad_tensors))
        super().__enter__()
        try:
            torch.autograd.Variable._execution_engine.run_backward(
                tensors,
                tuple(torch.ones_like(t) if g is None else g for t, g in zip_longest(tensors, grads)),
                bool(retain_graph),
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        finally:
            super().__exit__(None, None, None)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@torch.no_grad()
def widen(model: nn.Module, rounded_to: torch.dtype) -> nn.Module:
    """`model` with its float32 parameters and buffers in float64, in place, after rounding the parameters.

    Args:
        rounded_to: the type in which the run that is compared starts from its weights.
    """
    for param in model.parameters():
        param.data = param.data.to(rounded_to).double()
    for buffer in model.buffers():
        if buffer.dtype == torch.float32:
            buffer.data = buffer.data.double()
    return model
