"""When a loss or a gradient is not finite on any rank, all ranks stop with one message that names where that began."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import device
from megatron.core.activity import activity, communicating
from megatron.core.collectives import all_reduce
from megatron.core.distributed.torch_fully_sharded_data_parallel import local_part

logger = logging.getLogger(__name__)

SPIKE_FACTOR = 10.0
LOSSES_REMEMBERED = 100
MOST_BYTES_KEPT = 2**28
"""Batches of a step are kept for a second run up to this size: 256 MiB, nine million tokens."""


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is nan or infinite; the message names the place where that began."""


class RememberingIterator:
    """Passes batches on and keeps those since the last `begin_step`, so that the step can be run once more."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.kept: list[Any] | None = None
        """None if nobody asked to keep them, or they are too large."""
        self.bytes_kept = 0

    def __iter__(self) -> RememberingIterator:
        return self

    def __next__(self) -> Any:
        with activity("read batch"):
            batch = next(self.batches)
        if self.kept is not None:
            self.kept.append(batch)
            self.bytes_kept += _bytes_of(batch)
            if self.bytes_kept > MOST_BYTES_KEPT:
                self.kept = None
        return batch

    def begin_step(self) -> None:
        """Forget what was kept, and keep what comes."""
        self.kept, self.bytes_kept = [], 0

    def replay(self) -> Iterator[Any]:
        """An iterator that yields the batches of the step again; only where they were `kept`."""
        assert self.kept is not None
        return iter(list(self.kept))


def begin_step(data: Any) -> None:
    """Keep the batches of the step that begins, of each of the iterators that can."""
    for iterator in _each(data):
        if isinstance(iterator, RememberingIterator):
            iterator.begin_step()


def can_replay(data: Any) -> bool:
    """Whether all ranks have kept the batches of this step, where they read any. Communicates: all-reduce over all."""
    can = all(
        iterator is None or (isinstance(iterator, RememberingIterator) and iterator.kept is not None)
        for iterator in _each(data)
    )
    all_can = torch.tensor(can, dtype=torch.int32, device=device.current_device())
    all_reduce(all_can, dist.ReduceOp.MIN, what="whether the step can be run again")
    return bool(int(all_can))


def replay(data: Any) -> Any:
    """The batches of this step again, in the form of `data`; None where this rank reads none."""
    again = [None if iterator is None else iterator.replay() for iterator in _each(data)]
    return again if isinstance(data, list) else again[0]


def _each(data: Any) -> list[Any]:
    return data if isinstance(data, list) else [data]


def _bytes_of(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


# --- where it began -------------------------------------------------------------------------------


def first_nonfinite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter that holds a nan or infinity."""
    for name, param in model.named_parameters():
        if not bool(torch.isfinite(local_part(param)).all()):
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


@dataclass(frozen=True)
class Origin:
    """What one rank knows about a value that is not finite."""

    rank: int
    stage: int
    """Of the forward pass, where the parameter or module stands."""
    complaints: tuple[str, ...]
    """Losses and gradients of this rank that are not finite."""
    parameter: str | None = None
    module: str | None = None
    """The first whose output was not finite when the step was run once more."""
    ran_again: bool = True


def explain(origins: Sequence[Origin]) -> str:
    """Where it began, in one sentence: the first bad weight, else the first bad output, else the complaint itself.

    Bad values flow from stage to stage in the forward pass, so the earliest stage that has one is where they began.
    """
    in_order = sorted(origins, key=lambda origin: (origin.stage, origin.rank))
    complaints = [complaint for origin in reversed(in_order) for complaint in origin.complaints]
    said = "; ".join(dict.fromkeys(complaints[:2]))
    for origin in in_order:
        if origin.parameter is not None:
            return f"{said}; the first parameter that is not finite is {origin.parameter}, on rank {origin.rank}"
    for origin in in_order:
        if origin.module is not None:
            found = f"the first output that is not comes from {origin.module}, on rank {origin.rank}"
            return f"{said}; all parameters are finite; {found}"
    if not all(origin.ran_again for origin in origins):
        return f"{said}; all parameters are finite; the step was too large to be kept and run again"
    return f"{said}; all parameters and outputs are finite: the loss function or the backward pass made it"


# --- the check ------------------------------------------------------------------------------------


@dataclass
class FiniteCheck:
    """Collects what is not finite on this rank during a step, and stops all ranks at its end.

    It does not stop where it finds something: the other ranks would wait there for this one.

    Args:
        checks_finite: refuse losses that are nan or infinite.
        checks_spikes: warn of losses far above the first ones.
    """

    rank: int
    checks_finite: bool = True
    checks_spikes: bool = False
    iteration: int = 0
    """The present one, for messages."""
    complaints: list[str] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)

    def complain(self, text: str) -> None:
        """Note something that is not finite."""
        self.complaints.append(text)

    def watching(self, forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
        """`forward_step_func` whose loss function looks at the loss."""

        def step(data_iterator: Any, model: nn.Module) -> Any:
            output, loss_func = forward_step_func(data_iterator, model)
            return output, partial(self._checked_loss, loss_func)

        return step

    def _checked_loss(self, loss_func: Callable[..., Any], tensor: Tensor, **kwargs: Any) -> Any:
        result = loss_func(tensor, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if isinstance(loss, Tensor):
            value = float(loss.detach().sum())
            if self.checks_finite and not bool(torch.isfinite(loss).all()):
                self.complain(f"rank {self.rank}: the loss of iteration {self.iteration} is {value}")
            elif self.checks_spikes:
                tokens = float(result[1]) if isinstance(result, tuple) and len(result) == 3 else 1.0
                self._look_for_spike(value / max(tokens, 1.0))
        return result

    def _look_for_spike(self, loss: float) -> None:
        if len(self.first_losses) < LOSSES_REMEMBERED:
            self.first_losses.append(abs(loss))
        elif abs(loss) >= SPIKE_FACTOR * max(self.first_losses):
            logger.warning(
                "spiky loss: %.6E in iteration %d on rank %d is at least %g times the largest of the first %d (%.6E)",
                *(loss, self.iteration, self.rank, SPIKE_FACTOR, LOSSES_REMEMBERED, max(self.first_losses)),
            )

    def agree(self, model: Sequence[nn.Module], stages: Sequence[int], run_again: Callable[[], bool]) -> None:
        """Go on only if no rank has found anything. Communicates: all-reduce over all ranks.

        Args:
            model: this rank's chunks.
            stages: where each of them stands in the order of the forward pass.
            run_again: runs the forward pass of the step once more on all ranks; whether it could.

        Raises:
            NonFiniteLoss: a rank has; with the same message on all of them.
        """
        found = torch.tensor(len(self.complaints), dtype=torch.int32, device=device.current_device())
        all_reduce(found, dist.ReduceOp.MAX, what="findings of the check for nan")
        if not int(found):
            return
        origins: list[Any] = [None] * dist.get_world_size()
        mine = self._origin(model, stages, run_again)
        with communicating("all-gather", None, of="findings of the check for nan"):
            dist.all_gather_object(origins, mine)
        raise NonFiniteLoss(f"{explain(origins)}. (--no-check-for-nan-in-loss-and-grad continues regardless.)")

    def _origin(self, model: Sequence[nn.Module], stages: Sequence[int], run_again: Callable[[], bool]) -> Origin:
        complaints, self.complaints = tuple(self.complaints), []
        chunks = nn.ModuleList(model)
        ran: list[bool] = []
        parameter = first_nonfinite_parameter(chunks)
        module = first_nonfinite_module(chunks, lambda: ran.append(run_again()))
        chunk, name = _split_chunk(parameter or module)
        kind = {"parameter": name} if parameter else {"module": name}
        return Origin(self.rank, stages[chunk], complaints, ran_again=ran[0], **kind)


def _split_chunk(name: str | None) -> tuple[int, str | None]:
    """`1.module.layers.0` is `module.layers.0` of chunk 1."""
    if name is None:
        return 0, None
    chunk, _, rest = name.partition(".")
    return int(chunk), rest
