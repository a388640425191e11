"""Activations that are computed again in backward instead of being kept (Chen et al., arXiv:1604.06174; Korthikanti
et al., arXiv:2205.05198, section 5). The second time draws the same random numbers, under the same autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.tensor_parallel.rng_tracker import get_all_rng_states, replayed_rng
from megatron.core.tensor_parallel.utils import gather_split_1d_tensor, split_tensor_into_1d_equal_chunks


class _SecondRun:
    """What a function needs to be run again as it was run first: arguments, random states, autocast.

    The tensors among the arguments are left to the caller, who stores them where autograd watches over them.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self.function = function
        self.rng_states = get_all_rng_states()
        kind = device.device_type()
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.is_tensor = [isinstance(arg, Tensor) for arg in args]
        self.others = [None if is_tensor else arg for arg, is_tensor in zip(args, self.is_tensor)]
        self.needs_grad = [arg.requires_grad for arg in args if isinstance(arg, Tensor)]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[list[Any], tuple[Any, ...]]:
        """(arguments, outputs) of the second run, with a graph from the tensors that need gradients."""
        inputs = iter([t.detach().requires_grad_(needs) for t, needs in zip(tensors, self.needs_grad)])
        args = [next(inputs) if is_tensor else other for is_tensor, other in zip(self.is_tensor, self.others)]
        with replayed_rng(self.rng_states), torch.enable_grad(), torch.autocast(*self.autocast):
            outputs = self.function(*args)
        return args, outputs if isinstance(outputs, tuple) else (outputs,)


def _backward(args: list[Any], outputs: Sequence[Any], output_grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of `args`; those of parameters on the way accumulate as ever."""
    pairs = [(o, g) for o, g in zip(outputs, output_grads) if isinstance(o, Tensor) and o.requires_grad]
    pairs = [(output, grad) for output, grad in pairs if grad is not None]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    return [arg.grad if isinstance(arg, Tensor) else None for arg in args]


def _own(output: Any) -> Any:
    """A parameter that a function hands through must stay a leaf: the result is another tensor of the same data."""
    return output.detach() if isinstance(output, Tensor) and output.is_leaf and output.requires_grad else output


def _run_first(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    with torch.no_grad():
        outputs = function(*args)
    return tuple(map(_own, outputs)) if isinstance(outputs, tuple) else _own(outputs)


class CheckpointFunction(torch.autograd.Function):
    """Runs a function without storing its activations; backward runs it again with the same random numbers."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], distribute_saved_activations: bool | ProcessGroup, *args: Any
    ) -> Any:
        ctx.second_run = _SecondRun(function, args)
        ctx.distribute = distribute_saved_activations
        outputs = _run_first(function, args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if ctx.distribute:
            ctx.first_shape = tensors[0].shape
            tensors[0] = split_tensor_into_1d_equal_chunks(tensors[0].detach(), True, _group(ctx.distribute))
        ctx.save_for_backward(*tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        if ctx.distribute:
            tensors[0] = gather_split_1d_tensor(tensors[0], _group(ctx.distribute)).view(ctx.first_shape)
        args, outputs = ctx.second_run(tensors)
        return (None, None, *_backward(args, outputs, output_grads))


def _group(distribute: bool | ProcessGroup) -> ProcessGroup | None:
    return None if isinstance(distribute, bool) else distribute


def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool | ProcessGroup, *args: Any) -> Any:
    """`function(*args)` whose activations are recomputed in backward.

    Args:
        distribute_saved_activations: store only 1/tp of the first argument on each rank of the given group, or, if
            True, of the default tensor parallel group. Communicates: all-gather in backward.
        args: tensors that need gradients must be among them, not in the closure.
    """
    return CheckpointFunction.apply(function, distribute_saved_activations, *_differentiable(args))


def _differentiable(args: Sequence[Any]) -> Sequence[Any]:
    """`args`, of which one needs a gradient: without any, autograd would never come by for those of the parameters."""
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not torch.is_grad_enabled() or not tensors or any(args[i].requires_grad for i in tensors):
        return args
    first = tensors[0]
    return [*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :]]


class CheckpointWithoutOutput:
    """Recomputation of a function whose output is dropped too, as soon as it has been used.

        norm = CheckpointWithoutOutput()
        normed = norm.checkpoint(layer_norm, x)
        y = linear(normed)
        norm.discard_output_and_register_recompute(y)

    The linear layer's backward needs `normed`: once the gradient of y is there, and before it is used, `normed` is
    computed from x again, in the memory that others refer to. Only x is kept, which the residual stream keeps anyway.

    Args:
        fp8: for the public interface.
    """

    def __init__(self, fp8: bool = False) -> None:
        if fp8:
            raise NotImplementedError("CheckpointWithoutOutput(fp8=True) is not built yet")
        self.ctx: Any = None
        self.outputs: tuple[Tensor, ...] = ()

    def checkpoint(self, run_function: Callable[..., Any], *args: Any) -> Any:
        """`run_function(*args)`; what is said of `args` in `tensor_parallel.checkpoint` holds here."""
        outputs = CheckpointWithoutOutputFunction.apply(run_function, self, *_differentiable(args))
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs

    def discard_output_and_register_recompute(self, hook_tensor: Tensor) -> None:
        """Free the outputs' memory until the gradient of `hook_tensor`, computed from them, is known.

        Nothing happens where there will be no backward.

        Raises:
            ValueError: an output is an input, or shares its memory: freeing it would lose that too.
        """
        outputs, self.outputs = self.outputs, ()
        if not hook_tensor.requires_grad:
            return
        kept = {tensor.untyped_storage().data_ptr() for tensor in self.ctx.saved_tensors}
        if any(output.untyped_storage().data_ptr() in kept for output in outputs):
            raise ValueError("CheckpointWithoutOutput needs a function whose output has memory of its own")
        sizes = [output.untyped_storage().nbytes() for output in outputs]
        for output in outputs:
            output.untyped_storage().resize_(0)

        def recompute(_: Tensor) -> None:
            ctx = self.ctx
            ctx.args, ctx.outputs = ctx.second_run(ctx.saved_tensors)
            for output, again, size in zip(outputs, ctx.outputs, sizes):
                output.untyped_storage().resize_(size)
                with torch.no_grad(), _unchanged_version(output):
                    output.copy_(again)

        hook_tensor.register_hook(recompute)


@contextmanager
def _unchanged_version(tensor: Tensor) -> Iterator[None]:
    """Autograd refuses saved tensors that have been written to since; these get the values that they had."""
    with torch.autograd._unsafe_preserve_version_counter(tensor):
        yield


class CheckpointWithoutOutputFunction(torch.autograd.Function):
    """The node of a `CheckpointWithoutOutput` in the graph."""

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], owner: CheckpointWithoutOutput, *args: Any) -> Any:
        ctx.second_run = _SecondRun(run_function, args)
        outputs = _run_first(run_function, args)
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        owner.ctx, ctx.args = ctx, None
        return outputs

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.args is None:  # the output was never discarded
            ctx.args, ctx.outputs = ctx.second_run(ctx.saved_tensors)
        args, outputs, ctx.args, ctx.outputs = ctx.args, ctx.outputs, None, None
        return (None, None, *_backward(args, outputs, output_grads))
