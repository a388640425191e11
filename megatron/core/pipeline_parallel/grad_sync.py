"""When, during a pipeline step, the data parallel traffic of each model chunk may start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from megatron.core.pipeline_parallel.output_weight_grads import finish_output_weight_grads
from megatron.core.pipeline_parallel.schedule import Compute, Kind, Step


class GradientSync:
    """Holds back the reduction of gradients until a chunk's last backward, and starts it and the gathering of weights
    at the same time on all ranks where the config has functions for that.

    Uses, as lists with an entry for each chunk or as a single function:

    - `config.no_sync_func`: context in which backward leaves gradients unreduced. A chunk leaves it before its last
      backward.
    - `config.grad_sync_func(parameters)`: with it, the chunks of all ranks but the first stay in that context; the
      function starts their reduction, on rank p a number p of backwards after the chunk's last one, which is when
      rank 0 runs that one.
    - `config.param_sync_func(parameters)`: starts gathering weights; those of two chunks at the beginning, of each
      further chunk when the one before has its first forward on rank 0.
    """

    def __init__(self, config: Any, chunks: Sequence[nn.Module], steps: list[Step], rank: int) -> None:
        self.config, self.chunks, self.rank = config, chunks, rank
        self.no_sync = _one_for_each(config.no_sync_func, len(chunks))
        self.grad_sync = _one_for_each(config.grad_sync_func, len(chunks)) if rank > 0 else []
        self.param_sync = _one_for_each(config.param_sync_func, len(chunks))
        computes = [step for step in steps if isinstance(step, Compute)]
        self.trains = any(c.kind is not Kind.FORWARD for c in computes)
        self.last_pass = _last_passes(computes, shared=len(self.no_sync) < len(chunks))
        self.reduce_after = _aligned_reductions(computes, rank)
        forwards = [c for c in computes if c.kind is Kind.FORWARD]
        started = {c.chunk: i for i, c in reversed(list(enumerate(forwards)))}
        self.gather_at = {forwards[max(0, i - rank)]: chunk + 1 for chunk, i in started.items()}
        self.contexts: dict[int, ExitStack] = {}
        self.unreduced = set(range(len(chunks)))
        self.ungathered = set(range(len(chunks)))

    def __enter__(self) -> GradientSync:
        for chunk, function in enumerate(self.no_sync):
            context: AbstractContextManager[Any] = function()
            self.contexts[chunk] = ExitStack()
            self.contexts[chunk].enter_context(context)
        if self.trains and self.param_sync:
            for chunk in range(min(2, len(self.chunks))):
                self._gather(chunk)
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: Any) -> None:
        for context in self.contexts.values():
            context.close()
        if error is None and self.trains and self.grad_sync:
            for chunk in sorted(self.unreduced):
                self._reduce(chunk)

    def before(self, step: Step) -> None:
        """Called before each step runs."""
        if not isinstance(step, Compute):
            return
        if step in self.last_pass and self.contexts and not self.grad_sync:
            self.contexts.pop(self.last_pass[step]).close()
        if self.trains and self.param_sync and step in self.gather_at:
            self._gather(self.gather_at[step])

    def after(self, step: Step) -> None:
        """Called after each step has run."""
        if self.grad_sync and isinstance(step, Compute):
            for chunk in self.reduce_after.get(step, ()):
                self._reduce(chunk)

    def _gather(self, chunk: int) -> None:
        if chunk in self.ungathered:
            self.ungathered.remove(chunk)
            self.param_sync[chunk](self.chunks[chunk].parameters())

    def _reduce(self, chunk: int) -> None:
        self.unreduced.remove(chunk)
        finish_output_weight_grads(self.config, [self.chunks[chunk]])  # what is reduced has to be whole
        self.grad_sync[chunk](self.chunks[chunk].parameters())


def _last_passes(computes: list[Compute], shared: bool) -> dict[Compute, int]:
    """The last backward of each chunk, with its chunk; of all chunks together, as chunk 0, if they share a context."""
    passes = [c for c in computes if c.kind in (Kind.BACKWARD, Kind.INPUT_GRAD)]
    last = {0 if shared else c.chunk: c for c in passes}
    return {c: chunk for chunk, c in last.items()}


def _aligned_reductions(computes: list[Compute], delay: int) -> dict[Compute, list[int]]:
    """After which computation the chunks' gradients are reduced, `delay` backwards after their last; the others
    later."""
    passes = [i for i, c in enumerate(computes) if c.kind in (Kind.BACKWARD, Kind.INPUT_GRAD)]
    last_pass = {computes[at].chunk: number for number, at in enumerate(passes)}
    last_gradient = {c.chunk: i for i, c in enumerate(computes) if c.kind is not Kind.FORWARD}
    found: dict[Compute, list[int]] = {}
    for chunk, number in last_pass.items():
        if number + delay < len(passes):
            at = max(last_gradient[chunk], passes[number + delay])
            found.setdefault(computes[at], []).append(chunk)
    return found


def _one_for_each(functions: Any, num_chunks: int) -> list[Callable[..., Any]]:
    if functions is None:
        return []
    if isinstance(functions, (list, tuple)):
        if len(functions) != num_chunks:
            raise ValueError(f"{len(functions)} functions for {num_chunks} model chunks; give one for each")
        return list(functions)
    return [functions]
