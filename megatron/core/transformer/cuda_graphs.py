"""A layer's forward and backward captured once as CUDA graphs, and replayed instead of launched kernel by kernel.

A captured pass works in memory of its own: what goes in is copied there, the result is read there, and so are the
gradients. As a pass keeps its activations there until its backward, a layer has as many captured passes as it has
micro-batches between their forward and their backward at a time, one without a pipeline. They are captured when first
needed, and only after the layer has been through some passes kernel by kernel, which compile, choose and allocate what
must not happen during a capture.

While a pass is captured nothing is computed, so gradients that a product adds straight to `main_grad` are added by the
replay alone. All others reach their parameters through autograd, whose hooks run as without graphs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron.core.device import device_type
from megatron.core.transformer.transformer_config import TransformerConfig

Results = tuple[Tensor | None, ...]


class Recorder(Protocol):
    """What turns work on tensors that stay where they are into something to be done again."""

    def record(self, work: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """(tensors into which each replay writes the results of `work`, replay); `work` itself has no effect yet."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory, and are replayed in the order in which they were recorded."""

    def __init__(self) -> None:
        if device_type() != "cuda":
            raise RuntimeError(
                f"enable_cuda_graph captures the kernels of a CUDA device, and this process computes on {device_type()}"
                ": leave it off"
            )
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (data loading, NCCL's watchdog) may go on with what a capture forbids.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


class CapturedPass:
    """One forward and one backward of a layer on tensors of given shapes.

    Args:
        run: the layer as a function of tensors and parameters to one tensor.
        examples: such tensors; those that require a gradient get one.
        params: what else gets a gradient. `run` is handed others in the same memory.
    """

    def __init__(
        self, run: Callable[..., Tensor], examples: Sequence[Tensor], params: Sequence[Tensor], recorder: Recorder
    ) -> None:
        self._run = run
        self.params = tuple(params)
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in examples]
        # Autograd has a node for each parameter that belongs to the stream of its first use, and may outlive a step:
        # no work of a capture may wait for that stream. These have nodes of their own.
        self._own_params = [_in_same_memory(param) for param in self.params]
        self._wanted = [x for x in (*self.inputs, *self._own_params) if x.requires_grad]
        self._result: Tensor | None = None
        self._lease: weakref.ref[_Lease] | None = None
        (output,), self._replay_forward = recorder.record(self._forward)
        assert output is not None
        self.output = output
        self.grad_output = torch.empty_like(output)
        self._grads, self._replay_backward = recorder.record(self._backward)

    def _forward(self) -> Results:
        with torch.enable_grad():
            self._result = self._run(*self.inputs, *self._own_params)
        return (self._result.detach(),)

    def _backward(self) -> Results:
        result, self._result = self._result, None
        assert result is not None
        return torch.autograd.grad((result,), self._wanted, (self.grad_output,), allow_unused=True)

    @property
    def busy(self) -> bool:
        """Whether a backward is still to come that needs the activations which lie here."""
        return self._lease is not None and self._lease() is not None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The layer's output for `tensors`; its memory is overwritten once its backward is done."""
        return _Replay.apply(self, *tensors, *self.params)

    def forward(self, tensors: Sequence[Tensor]) -> _Lease:
        """Fills `output`; the pass is busy as long as the returned object lives."""
        for own, given in zip(self.inputs, tensors):
            own.detach().copy_(given)
        self._replay_forward()
        lease = _Lease(self)
        self._lease = weakref.ref(lease)
        return lease

    def backward(self, grad_output: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs and parameters, in this order; None for those that have or need none."""
        self.grad_output.copy_(grad_output)
        self._replay_backward()
        grads = iter(self._grads)
        return [
            *(self._of_input(next(grads)) if x.requires_grad else None for x in self.inputs),
            *(self._of_param(param, next(grads)) if param.requires_grad else None for param in self.params),
        ]

    @staticmethod
    def _of_input(grad: Tensor | None) -> Tensor | None:
        """A copy: a pipeline may still be sending it when the next micro-batch is here."""
        return None if grad is None else grad.clone()

    @staticmethod
    def _of_param(param: Tensor, grad: Tensor | None) -> Tensor | None:
        """A `main_grad` takes it up at once, so that autograd may have the memory; else it makes a copy of what others
        hold, and must."""
        return grad if grad is None or not hasattr(param, "main_grad") else _alias(grad)


class _Lease:
    """Of one forward on a captured pass, until its backward, or until nobody can ask for that."""

    def __init__(self, captured: CapturedPass) -> None:
        self.captured = captured


class _Replay(torch.autograd.Function):
    """(pass, inputs and parameters) -> output."""

    @staticmethod
    def forward(ctx: Any, captured: CapturedPass, *tensors: Tensor) -> Tensor:
        ctx.lease = captured.forward(tensors[: len(captured.inputs)])
        return _alias(captured.output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        lease, ctx.lease = ctx.lease, None
        if lease is None:
            raise RuntimeError("a layer in a CUDA graph (enable_cuda_graph) has one backward for each forward")
        return None, *lease.captured.backward(grad_output)


def _in_same_memory(param: Tensor) -> nn.Parameter:
    """Another parameter with the values, the `main_grad` and all other attributes of `param`."""
    other = nn.Parameter(param.detach(), requires_grad=param.requires_grad)
    other.__dict__.update(param.__dict__)
    return other


def _alias(x: Tensor) -> Tensor:
    """Another tensor in the same memory, no view: a pipeline takes its memory away from the output that it has sent."""
    alias = x.new_empty(0)
    alias.data = x
    return alias


class CudaGraphManager(nn.Module):
    """Runs layers, through captured passes where they train.

    Args:
        share_cudagraph_io_buffers: not built: each pass has memory of its own for what goes in and out.
        recorder: makes what captures one pass.

    Raises:
        NotImplementedError: `share_cudagraph_io_buffers`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        share_cudagraph_io_buffers: bool | None = None,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        super().__init__()
        if share_cudagraph_io_buffers:
            raise NotImplementedError("share_cudagraph_io_buffers is not built yet; leave it out")
        self.config = config
        self.recorder = recorder or CudaRecorder
        self._passes: dict[Any, list[CapturedPass]] = {}
        self._warm: Counter[nn.Module] = Counter()
        """Backward passes that each layer has been through without a graph."""

    def __call__(self, megatron_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`megatron_module(*args, **kwargs)`: a tensor, or (a tensor, the argument `context`).

        Raises:
            ValueError: an argument is neither a tensor nor a plain value, or the result is something else.
        """
        if not (megatron_module.training and torch.is_grad_enabled()):
            return megatron_module(*args, **kwargs)
        if self._warm[megatron_module] < max(1, self.config.cuda_graph_warmup_steps):
            return self._warming(megatron_module, megatron_module(*args, **kwargs))
        self.call_ddp_preforward_hook(megatron_module)
        captured = self._free_pass(megatron_module, args, kwargs)
        output = captured(*_tensors((args, kwargs)))
        return (output, kwargs["context"]) if "context" in kwargs else output

    @property
    def num_captured(self) -> int:
        """Passes, of all layers together."""
        return sum(map(len, self._passes.values()))

    def call_ddp_preforward_hook(self, module: nn.Module) -> None:
        """Wait for the weights of `module` as its parts do before they run, which a replay does not have run."""
        for part in module.modules():
            for hook in part._forward_pre_hooks.values():
                hook(part, ())

    def _warming(self, module: nn.Module, result: Any) -> Any:
        output = result[0] if isinstance(result, tuple) else result
        if output.requires_grad:
            output.register_hook(lambda grad: self._warm.update([module]))
        return result

    def _free_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedPass:
        """One that is not busy; a new one where there is none."""
        passes = self._passes.setdefault((module, _described((args, kwargs))), [])
        found = next((one for one in passes if not one.busy), None)
        if found is None:
            found = self._capture(module, args, kwargs)
            passes.append(found)
        return found

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedPass:
        def run(*tensors: Tensor) -> Tensor:  # the arguments, then the parameters
            given = iter(tensors)
            own_args, own_kwargs = _mapped(lambda part: next(given) if part is _SLOT else part, form)
            result = functional_call(module, dict(zip(params, given)), own_args, own_kwargs)
            if "context" in own_kwargs:
                result, context = result
                if context is not own_kwargs["context"]:
                    raise ValueError("a layer in a CUDA graph (enable_cuda_graph) hands its context on as it is")
            return result

        # Not the arguments themselves, whose memory the pass would keep.
        form = _mapped(lambda part: _SLOT if isinstance(part, Tensor) else part, (args, kwargs))
        params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        return CapturedPass(run, _tensors((args, kwargs)), list(params.values()), self.recorder())


_SLOT = object()
"""Where a tensor belongs."""


def _tensors(value: Any) -> list[Tensor]:
    """Those in nested tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` of each thing in nested tuples and dictionaries, in order."""
    if isinstance(value, dict):
        return {name: _mapped(function, part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(function, part) for part in value)
    return function(value)


def _described(value: Any, name: str = "its arguments") -> Any:
    """Equal for arguments that one captured pass serves: shapes and types of tensors, and all plain values."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, dict):
        return tuple((key, _described(part, key)) for key, part in value.items())
    if isinstance(value, tuple):
        return tuple(_described(part, name) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        "a layer in a CUDA graph (enable_cuda_graph) takes tensors and plain values: "
        f"{name} is a {type(value).__name__}"
    )
