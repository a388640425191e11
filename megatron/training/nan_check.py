"""When a loss is not finite: which parameter, or which module's output, was the first to go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteLoss(RuntimeError):
    """A loss is nan or infinite; the message names the place where that began."""


class RememberingIterator:
    """Passes batches on and keeps the last one, so that a microbatch can be run once more."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.last: Any = None

    def __iter__(self) -> RememberingIterator:
        return self

    def __next__(self) -> Any:
        self.last = next(self.batches)
        return self.last

    def replay(self) -> Iterator[Any]:
        """An iterator that yields the last batch again."""
        return iter([self.last])


def first_nonfinite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter that holds a nan or infinity."""
    for name, param in model.named_parameters():
        if not bool(torch.isfinite(param).all()):
            return name
    return None


def first_nonfinite_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the first module whose output is not finite when `run` runs the model once more."""
    found: list[str] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
            if not found and any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
                found.append(name or type(module).__name__)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def checked_forward_step(
    forward_step_func: Callable[..., Any], rank: int, iteration: int
) -> Callable[[Any, nn.Module], Any]:
    """`forward_step_func` whose loss function refuses a loss that is not finite.

    Raises (from the loss function): NonFiniteLoss, naming the first bad parameter, or the first module whose
    output is bad.
    """

    def step(data_iterator: Any, model: nn.Module) -> Any:
        output, loss_func = forward_step_func(data_iterator, model)

        def checked_loss(tensor: Tensor, **kwargs: Any) -> Any:
            result = loss_func(tensor, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
                where = _explain(forward_step_func, data_iterator, model)
                raise NonFiniteLoss(
                    f"rank {rank}: the loss of iteration {iteration} is {float(loss.detach().sum())}; {where}. "
                    "(--no-check-for-nan-in-loss-and-grad continues regardless.)"
                )
            return result

        return output, checked_loss

    return step


def _explain(forward_step_func: Callable[..., Any], data_iterator: Any, model: nn.Module) -> str:
    parameter = first_nonfinite_parameter(model)
    if parameter is not None:
        return f"the first parameter that is not finite is {parameter}"
    replay = data_iterator.replay() if isinstance(data_iterator, RememberingIterator) else None
    module = first_nonfinite_module(model, lambda: forward_step_func(replay, model))
    if module is not None:
        return f"all parameters are finite; the first output that is not comes from {module}"
    return "all parameters and outputs are finite: the loss function itself made it"
