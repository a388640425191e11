"""An all-to-all with something else computed while it travels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import InFlight, start_all_to_all

WHAT = "tokens of experts"


class Exchange:
    """Rows of `x` to every rank of `group`: `start`, whatever else there is to compute, `finish`.

    Backward is the inverse exchange: launched where `finish` was, and waited for where `start` was. What was computed
    in between goes backward in between, since autograd takes later operations first.
    """

    def __init__(
        self, group: ProcessGroup | None, output_splits: list[int] | None, input_splits: list[int] | None
    ) -> None:
        self.group, self.output_splits, self.input_splits = group, output_splits, input_splits
        self.flight: InFlight | None = None
        self.sent: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """An empty tensor that says what backward has to go through; to be handed to `finish`."""
        return _Start.apply(x, self)

    def finish(self, promised: Tensor) -> Tensor:
        """The rows that arrived."""
        return _Finish.apply(promised, self)

    def launch(self, x: Tensor, *, back: bool) -> Tensor:
        """Send; an empty tensor."""
        splits = (self.input_splits, self.output_splits) if back else (self.output_splits, self.input_splits)
        self.sent = x.contiguous()  # must live as long as it travels
        self.flight = start_all_to_all(self.sent, self.group, *splits, what=WHAT)
        return x.new_empty(0)

    def land(self) -> Tensor:
        """Wait; what arrived."""
        assert self.flight is not None
        arrived, self.flight, self.sent = self.flight.wait(), None, None
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(x, back=False)

    @staticmethod
    def backward(ctx: Any, promised: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.land(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, promised: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        arrived = exchange.land()
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.launch(grad_output, back=True), None


def exchange_during(
    compute: Callable[[], None],
    tensors: tuple[Tensor, ...],
    group: ProcessGroup | None,
    output_splits: list[int] | None,
    input_splits: list[int] | None,
) -> tuple[Tensor, ...]:
    """What every rank of `group` sent of each of the tensors; `compute` is called while they travel."""
    exchanges = [Exchange(group, output_splits, input_splits) for _ in tensors]
    promised = [exchange.start(x) for exchange, x in zip(exchanges, tensors)]
    compute()
    return tuple(exchange.finish(x) for exchange, x in zip(exchanges, promised))
