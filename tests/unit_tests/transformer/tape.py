"""What stands for CUDA graphs where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from megatron.core.transformer.cuda_graphs import Results


class Tape:
    """Does recorded work anew for each replay. As with CUDA graphs, recording computes nothing: what the work has added
    to `kept` is taken back, and the results are NaN until the first replay."""

    kept: ClassVar[list[Tensor]] = []
    recorded: ClassVar[int] = 0
    log: ClassVar[list[str]] = []

    def record(self, work: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        before = [tensor.clone() for tensor in self.kept]
        results = tuple(None if one is None else torch.full_like(one, torch.nan) for one in work())
        for tensor, value in zip(self.kept, before):
            tensor.copy_(value)
        Tape.recorded += 1
        number = Tape.recorded

        def replay() -> None:
            Tape.log.append(f"{work.__name__.strip('_')} {number}")
            for place, one in zip(results, work()):
                if place is not None:
                    place.copy_(one)

        return results, replay
