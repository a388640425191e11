"""The public tables of the interleaved schedule. The lists that are run come from `orders`."""

from __future__ import annotations

from megatron.core.pipeline_parallel.orders import ScheduleRequest, chunk_turns, num_warmup
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.utils import get_pg_rank, get_pg_size


def get_schedule_table(
    num_microbatches: int, num_model_chunks: int, microbatch_group_size_per_vp_stage: int
) -> list[tuple[int, int]]:
    """(microbatch, chunk) in the order of forward; backward has the same order with the chunks counted from the last.

    >>> get_schedule_table(3, 2, 2)
    [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    """
    turn = microbatch_group_size_per_vp_stage
    return chunk_turns(ScheduleRequest("interleaved", 1, num_microbatches, num_model_chunks, turn))


def convert_schedule_table_to_order(
    num_warmup_microbatches: int, num_model_chunks: int, schedule_table: list[tuple[int, int]]
) -> list[int]:
    """The order of work as chunk numbers counted from 1, positive for forward and negative for backward."""
    _, chunks = zip(*schedule_table)
    forward = [chunk + 1 for chunk in chunks]
    backward = [chunk - num_model_chunks for chunk in chunks]
    order = forward[:num_warmup_microbatches]
    for i in range(num_warmup_microbatches, len(forward)):
        order += [forward[i], backward[i - num_warmup_microbatches]]
    return order + (backward[-num_warmup_microbatches:] if num_warmup_microbatches else [])


def get_pp_rank_microbatches(
    num_microbatches: int,
    num_model_chunks: int,
    microbatch_group_size_per_vp_stage: int | None,
    forward_only: bool = False,
) -> tuple[int, bool, int, int]:
    """(forwards and backwards of this rank, whether all forwards come before the first backward, forwards before it,
    the others), counting each microbatch once for each chunk."""
    group = default_process_groups().pp if has_default_process_groups() else None
    name = "1f1b" if num_model_chunks == 1 else "interleaved"
    request = ScheduleRequest(
        name,  # type: ignore[arg-type]
        get_pg_size(group),
        num_microbatches,
        num_model_chunks,
        microbatch_group_size_per_vp_stage,
    )
    total = num_microbatches * num_model_chunks
    if forward_only:
        warmup = total
    elif request.num_ranks == 1:
        warmup = min(1, total)
    elif num_model_chunks == 1:
        warmup = min(request.num_ranks - 1 - get_pg_rank(group), total)
    else:
        warmup = num_warmup(request, get_pg_rank(group))
    return total, warmup == total, warmup, total - warmup
