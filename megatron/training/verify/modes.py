"""Run the same code with other arithmetic: in float64, or with the sums of its matrix products in another order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _ArithmeticMode(TorchFunctionMode):
    """While it is on, `changed` decides what a call of torch does, in backward too."""

    def changed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`, as this mode computes it."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **(kwargs or {}))
        return self.changed(func, args, kwargs or {})

    def _backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, **others: Any
    ) -> None:
        """`torch.autograd.backward`, with the mode on: it is off inside what it intercepts, and backward runs code of
        ours, too."""
        if others.get("create_graph") or others.get("inputs"):
            raise NotImplementedError(f"create_graph and inputs do not work under {type(self).__name__}")
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


class Float64(_ArithmeticMode):
    """Every float32 that code asks torch for is a float64.

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

    def changed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_paused:
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


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


class Reordered(_ArithmeticMode):
    """Matrix products in half precision are sums of two to four partial products in random order.

    The contracted dimension is cut at random places, each partial product is rounded to the type of the factors, and so
    is each partial sum: what tensor, sequence, context and data parallel ranks do to the sums of one process, and
    nothing else. Runs with different seeds show how far a mere reordering takes the results.
    """

    MOST_PARTS = 4

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def changed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_half = len(args) > 1 and all(isinstance(a, Tensor) and a.dtype in _HALF for a in args[:2])
        if not is_half or kwargs:
            return func(*args, **kwargs)
        if func is torch.nn.functional.linear:
            product = self.product(args[0], args[1].mT)
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if func in _PRODUCTS:
            return self.product(args[0], args[1])
        return func(*args)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b, [..., m, k] times [..., k, n]."""
        length = a.size(-1)
        parts = min(self.random.randint(2, self.MOST_PARTS), length)
        cuts = [0, *sorted(self.random.sample(range(1, length), parts - 1)), length]
        spans = list(zip(cuts, cuts[1:]))
        self.random.shuffle(spans)
        total: Tensor | None = None
        for begin, end in spans:
            partial = torch.matmul(a[..., begin:end], b[..., begin:end, :])
            total = partial if total is None else total + partial
        assert total is not None
        return total


_HALF = (torch.bfloat16, torch.float16)
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.mm, torch.bmm, torch.Tensor.__matmul__)
