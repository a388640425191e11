"""Steps whose times are known, for tests."""

from __future__ import annotations

from megatron.core.pipeline_parallel.orders import ScheduleRequest
from megatron.core.pipeline_parallel.plan import plan_pipeline
from megatron.core.pipeline_parallel.timeline import Costs
from megatron.training.timeline.spans import MeasuredStep, Place, RankSpans, Span


def perfect_step(
    stages: int = 4,
    microbatches: int = 8,
    replicas: int = 1,
    *,
    name: str = "1f1b",
    chunks: int = 1,
    begin: float = 0.5,
    costs: Costs | None = None,
) -> MeasuredStep:
    """A step in which all goes exactly as planned, `begin` seconds after reading data; unit times are milliseconds."""
    plan = plan_pipeline(ScheduleRequest(name, stages, microbatches, chunks))  # type: ignore[arg-type]
    costs = costs or Costs(forward=1e-3, input_grad=1e-3, weight_grad=1e-3)
    ranks = []
    for data in range(replicas):
        for stage, spans in enumerate(plan.timeline(costs).ranks):
            done = [
                Span(
                    span.compute.kind.value,  # type: ignore[arg-type]
                    f"{span.compute.kind.name} <{span.compute.microbatch}>",
                    begin + span.start,
                    begin + span.end,
                    0,
                    span.compute.microbatch,
                    span.compute.chunk,
                )
                for span in spans
            ]
            end = done[-1].end
            inside = Span("collective", "all-reduce & more", done[0].start, done[0].start + 2e-4, 1)
            extra = [Span("data", "read batch", 0.0, begin / 2), Span("optimizer", "optimizer", end, end + 2e-3)]
            place = Place(pipeline=stage, data=data)
            ordered = sorted([*done, *extra, inside], key=lambda span: (span.start, -span.end))
            ranks.append(RankSpans(data + replicas * stage, "here, pid 7", place, tuple(ordered)))
    return MeasuredStep(3, tuple(ranks), plan)
