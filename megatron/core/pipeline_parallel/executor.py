"""Runs the steps of one pipeline rank: computations of microbatches, and the transfers between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device, parallel_state
from megatron.core.activity import activity, communicating, launched
from megatron.core.pipeline_parallel.grad_sync import GradientSync
from megatron.core.pipeline_parallel.microbatch import (
    ForwardStepFunction,
    backward_step,
    deallocate_output_tensor,
    run_forward,
)
from megatron.core.pipeline_parallel.p2p_transport import InFlight, Receive, Send, Shape, post
from megatron.core.pipeline_parallel.schedule import Compute, Direction, Kind, Post, Step, Transfer
from megatron.core.pipeline_parallel.transfers import target_of
from megatron.core.stage_placement import Placement
from megatron.core.tensor_parallel.weight_grad_queue import WeightGradQueue, deferring_weight_grads
from megatron.core.timers import timed

ACTIVITIES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRAD: "input gradient",
    Kind.WEIGHT_GRAD: "weight gradient",
}
"""Under which name each computation is known to `activity`."""

Key = tuple[int, int]
"""(Microbatch, chunk)."""


@dataclass
class StageExecutor:
    """One rank's share of a training or evaluation step."""

    forward_step_func: ForwardStepFunction
    data_iterators: Sequence[Any]
    """One for each chunk."""
    chunks: Sequence[nn.Module]
    config: Any
    num_microbatches: int
    shapes: dict[Direction, Shape]
    """What is received in each direction: activations [s/tp, b, h] with sequence parallelism, and their gradients."""
    group: ProcessGroup | None
    rank: int
    placement: Placement
    is_forward_only: bool
    collect_non_loss_data: bool = False

    reports: list[Any] = field(default_factory=list)
    """What the loss function reported, one entry a microbatch."""
    num_tokens: Tensor | int = 0
    _inputs: dict[Key, Tensor] = field(default_factory=dict)
    _outputs: dict[Key, Tensor] = field(default_factory=dict)
    _output_grads: dict[Key, Tensor] = field(default_factory=dict)
    _input_grads: dict[Key, Tensor] = field(default_factory=dict)
    _weight_grads: dict[Key, WeightGradQueue] = field(default_factory=dict)
    _in_flight: dict[Transfer, InFlight] = field(default_factory=dict)

    def run(self, steps: list[Step]) -> None:
        """All steps in order; gradient traffic of a chunk is held back until its last backward."""
        with GradientSync(self.config, self.chunks, steps, self.rank) as sync:
            for step in steps:
                sync.before(step)
                self._run_step(step)
                sync.after(step)
        assert not (self._in_flight or self._weight_grads), "a schedule ended before its work"

    def _run_step(self, step: Step) -> None:
        if isinstance(step, Compute):
            if len(self.chunks) > 1:
                parallel_state.set_virtual_pipeline_model_parallel_rank(step.chunk)
            with activity(ACTIVITIES[step.kind], microbatch=step.microbatch, chunk=step.chunk):
                self._compute(step)
        elif isinstance(step, Post):
            self._post(step.transfers)
        else:
            self._wait(step.transfers)

    # --- computations ---

    def _compute(self, compute: Compute) -> None:
        key = compute.microbatch, compute.chunk
        if compute.kind is Kind.FORWARD:
            self._forward(key)
        elif compute.kind is Kind.WEIGHT_GRAD:
            with timed(self.config, "backward-compute"):
                self._weight_grads.pop(key).run()
        else:
            later = nullcontext() if compute.kind is Kind.BACKWARD else self._postponing(key)
            self._backward(key, later)

    def _forward(self, key: Key) -> None:
        chunk = key[1]
        stage = self.placement.stage_of(self.rank, chunk)
        is_last_stage = stage == self.placement.num_stages - 1
        output, tokens = run_forward(
            self.forward_step_func,
            self.data_iterators[chunk],
            self.chunks[chunk],
            self.num_microbatches,
            self._inputs.get(key),
            self.reports,
            self.config,
            is_last_stage=is_last_stage,
            collect_non_loss_data=self.collect_non_loss_data,
        )
        self.num_tokens = self.num_tokens + tokens
        if self.is_forward_only:
            self._inputs.pop(key, None)
        if not (self.is_forward_only and is_last_stage):
            self._outputs[key] = output
        own = self._own_chunk_after(Compute(Kind.FORWARD, *key))
        if own is not None:
            self._inputs[key[0], own] = output.detach().requires_grad_()
            self._release_output(key)

    def _postponing(self, key: Key) -> AbstractContextManager[WeightGradQueue]:
        self._weight_grads[key] = WeightGradQueue()
        return deferring_weight_grads(self._weight_grads[key])

    def _backward(self, key: Key, later: AbstractContextManager[Any]) -> None:
        with later:
            grad = backward_step(
                self._inputs.pop(key, None),
                self._outputs.pop(key),
                self._output_grads.pop(key, None),
                None,
                self.config,
            )
        if grad is None:
            return
        own = self._own_chunk_after(Compute(Kind.BACKWARD, *key))
        if own is not None:
            self._output_grads[key[0], own] = grad
        else:
            self._input_grads[key] = grad

    def _own_chunk_after(self, compute: Compute) -> int | None:
        """The chunk of this rank that takes what a computation gives, None if another rank does or nobody."""
        target = target_of(compute, self.placement.stage_of(self.rank, compute.chunk), self.placement)
        if target is None:
            return None
        holder = self.placement.holder_of(target)
        return holder.chunk if holder.rank == self.rank else None

    # --- transfers ---

    def _post(self, transfers: tuple[Transfer, ...]) -> None:
        assert self.group is not None
        # A receive whose length has to be asked for waits for the sender: together with others it could wait for a rank
        # that waits for them.
        at_once = [(t,) for t in transfers] if self.config.variable_seq_lengths else [transfers]
        for some in at_once:
            work = [
                Send(self._outgoing(t), t.peer) if t.is_send else Receive(self.shapes[t.direction], t.peer)
                for t in some
            ]
            for t, flight in zip(some, post(work, self.config, self.group)):
                flight.landed = launched(*self._named(t), **_number(t))
                self._in_flight[t] = flight

    def _outgoing(self, transfer: Transfer) -> Tensor:
        key = transfer.microbatch, transfer.chunk
        return self._outputs[key] if transfer.direction is Direction.FORWARD else self._input_grads.pop(key)

    def _wait(self, transfers: tuple[Transfer, ...]) -> None:
        with timed(self.config, timer_name(transfers)):
            for t in transfers:
                with communicating(*self._named(t), **_number(t)):
                    tensor = self._in_flight.pop(t).wait()
                self._finish(t, tensor)
            if self.config.batch_p2p_comm and self.config.batch_p2p_sync:
                device.synchronize()

    def _named(self, transfer: Transfer) -> tuple[str, ProcessGroup | None, int]:
        """What an activity is made of."""
        return "send" if transfer.is_send else "receive", self.group, transfer.peer

    def _finish(self, transfer: Transfer, tensor: Tensor) -> None:
        key = transfer.microbatch, transfer.chunk
        if not transfer.is_send:
            (self._inputs if transfer.direction is Direction.FORWARD else self._output_grads)[key] = tensor
        elif transfer.direction is Direction.FORWARD and key in self._outputs:
            self._release_output(key)

    def _release_output(self, key: Key) -> None:
        if self.is_forward_only:
            del self._outputs[key]
        elif self._outputs[key] is not self._inputs.get(key):  # a chunk without layers gives what it takes
            deallocate_output_tensor(self._outputs[key], self.config.deallocate_pipeline_outputs)


def _number(transfer: Transfer) -> dict[str, Any]:
    """What tells it from others."""
    kind = "activations" if transfer.direction is Direction.FORWARD else "gradients"
    of = f"{kind} of microbatch {transfer.microbatch}"
    return {"of": of, "microbatch": transfer.microbatch, "chunk": transfer.chunk}


def timer_name(transfers: tuple[Transfer, ...]) -> str:
    """E.g. `forward-send-backward-recv`; one name for all that go both ways with both neighbours."""
    kinds = list(dict.fromkeys((t.direction, t.is_send) for t in transfers))
    if len(kinds) > 2:
        return "forward-backward-send-forward-backward-recv"
    kinds.sort(key=lambda kind: (not kind[1], kind[0] is Direction.BACKWARD))
    return "-".join(f"{direction.name.lower()}-{'send' if is_send else 'recv'}" for direction, is_send in kinds)
