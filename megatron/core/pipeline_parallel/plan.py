"""A checked plan of a pipeline step: the request, what every rank does, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron.core.pipeline_parallel.check import Peaks, simulate
from megatron.core.pipeline_parallel.orders import ScheduleRequest, compute_orders, predicted_peaks
from megatron.core.pipeline_parallel.schedule import Order, Step
from megatron.core.pipeline_parallel.timeline import Durations, Timeline, planned_timeline
from megatron.core.pipeline_parallel.transfers import with_transfers


@dataclass(frozen=True)
class PipelinePlan:
    """What every rank does in one step."""

    request: ScheduleRequest
    orders: list[Order]
    """What each rank computes."""
    steps: list[list[Step]]
    """The same with transfers."""
    peaks: list[Peaks]

    def timeline(self, costs: Durations | None = None) -> Timeline:
        """When each computation would run, see `planned_timeline`."""
        return planned_timeline(self.orders, self.request.placement, costs)


@lru_cache(maxsize=64)
def plan_pipeline(
    request: ScheduleRequest, *, overlap: bool = False, overlap_warmup_flush: bool = False
) -> PipelinePlan:
    """The plan, checked before anything runs: all sends meet their receives, no rank waits forever, and no more
    activations are alive than the formula says.

    Raises:
        RuntimeError: the schedule would hang, or keep more than predicted.
    """
    orders = compute_orders(request)
    steps = with_transfers(orders, request.placement, overlap=overlap, overlap_warmup_flush=overlap_warmup_flush)
    peaks = simulate(steps, request.placement)
    predicted = predicted_peaks(request)
    if any(peak.activations > limit for peak, limit in zip(peaks, predicted)):
        found = [peak.activations for peak in peaks]
        raise RuntimeError(f"{request} keeps {found} microbatches alive on its ranks, predicted were {predicted}")
    return PipelinePlan(request, orders, steps, peaks)
