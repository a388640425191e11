"""However a rank ends, the others end soon and say which rank it was and what they waited for: real processes.

What depends on how long something takes is tested in simulated time beside this. Here most tests run with the slow
ones: on a machine with other work, seconds of patience would decide about them.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_ranks import End, run_to_the_end

SOON = 1.5
"""Timeout of communications, in seconds, where it is to pass."""
NEVER = 300.0
"""The same where it is not, on however loaded a machine."""


def be_patient() -> None:
    """From now on no rank of this process is given up, or reports on its state too early, because it is slow."""
    from megatron.training.failure import hub, start, watch

    hub.ANSWER_SECONDS, hub.COMPLAINT_SECONDS, watch.PATIENCE_SECONDS = 60.0, 30.0, 120.0
    watch.MOMENT_SECONDS, start.CONNECT_SECONDS = 5.0, 60.0


def run_until_the_end(
    folder: Path, world_size: int, scenario: Callable[..., None], *args: Any, timeout: float = SOON
) -> list[End]:
    """Run `scenario(*args)` on fresh processes that watch each other."""
    return run_to_the_end(folder, world_size, watched, timeout, scenario, *args)


def watched(timeout: float, scenario: Callable[..., None], *args: Any) -> None:
    """What a program does around its work."""
    import torch.distributed as dist

    from megatron.training.errors import exit_at_once_on_error
    from megatron.training.failure import hub, watch
    from megatron.training.failure.start import start_failure_watch, stop_failure_watch

    if timeout == SOON:
        hub.ANSWER_SECONDS, watch.PATIENCE_SECONDS, watch.SIGNAL_SECONDS = 1.0, 3.0, 0.5
    else:
        be_patient()
    with exit_at_once_on_error():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout + 0.5))
        start_failure_watch(timeout)
        try:
            scenario(*args)
        except SystemExit:
            atexit._run_exitfuncs()  # which multiprocessing leaves out
            raise
        stop_failure_watch()
        dist.destroy_process_group()


def reduce_for_ever(victim: int, end: Callable[[], None], steps: int = 3) -> None:
    """Sum over all ranks again and again; after some steps the victim does `end`."""
    import torch
    import torch.distributed as dist

    from megatron.core.collectives import all_reduce
    from megatron.training.failure import watch

    for step in range(10**9):
        if dist.get_rank() == victim and step == steps:
            watch.MOMENT_SECONDS = 0.0  # it is not on its way into a wait
            end()
        all_reduce(torch.ones(4), what="gradients")


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_without_a_word() -> None:
    os._exit(3)


def crash() -> None:
    os.abort()


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    while True:
        time.sleep(0.01)


def be_terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


def users_error() -> None:
    raise ValueError("--data-path holds nothing")


def program_error() -> None:
    raise KeyError("lost")


def go_home() -> None:
    sys.exit(0)


WAITED = "all-reduce of gradients over all ranks 0, 1 and 2"


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "victim, end",
    [
        pytest.param(0, kill_itself, marks=slow),
        (2, kill_itself),
        pytest.param(1, leave_without_a_word, marks=slow),
        pytest.param(2, crash, marks=slow),
    ],
)
def test_a_death_is_known_at_once(tmp_path: Path, victim: int, end: Callable[[], None]) -> None:
    ends = run_until_the_end(tmp_path, 3, reduce_for_ever, victim, end, timeout=NEVER)
    for rank in {0, 1, 2} - {victim}:
        assert ends[rank].code == 1
        assert f"[rank {rank}] stopping: rank {victim}" in ends[rank].said and "died" in ends[rank].said
        assert WAITED in ends[rank].said and "Traceback" not in ends[rank].said
        assert ends[rank].said.count("\n") == 1
    assert ends[victim].code not in (0, None)


def test_the_first_failure_alone_is_explained(tmp_path: Path, victim: int = 0) -> None:
    ends = run_until_the_end(tmp_path, 3, reduce_for_ever, victim, users_error, timeout=NEVER)
    assert ends[victim].said == f"[rank {victim}] ValueError: --data-path holds nothing\n"
    for rank in {0, 1, 2} - {victim}:
        assert f"stopping: rank {victim}" in ends[rank].said
        assert "failed: ValueError: --data-path holds nothing" in ends[rank].said
        assert WAITED in ends[rank].said
    assert [end.code for end in ends] == [1, 1, 1]


@slow
def test_traceback_of_a_programs_fault(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 2, reduce_for_ever, 1, program_error)
    assert ends[1].said.startswith("[rank 1] Traceback") and "in program_error" in ends[1].said
    assert "failed: KeyError: 'lost'" in ends[0].said and "Traceback" not in ends[0].said


@slow
def test_all_fail_alike(tmp_path: Path) -> None:
    """One rank says it whole, the others point to that one."""
    ends = run_until_the_end(tmp_path, 3, users_error)
    whole = [
        rank for rank, end in enumerate(ends) if end.said == f"[rank {rank}] ValueError: --data-path holds nothing\n"
    ]
    assert len(whole) == 1
    for rank in {0, 1, 2} - set(whole):
        assert f"stopping: rank {whole[0]} (pid" in ends[rank].said
        reason, _, rest = ends[rank].said.partition("failed: ValueError: --data-path holds nothing")
        assert reason and (rest == ", as here\n" or "was at" in rest)  # the verdict may be faster than its own failure
    assert [end.code for end in ends] == [1, 1, 1]


@slow
def test_a_rank_that_hangs_is_found(tmp_path: Path, victim: int = 2) -> None:
    ends = run_until_the_end(tmp_path, 3, reduce_for_ever, victim, hang)
    assert [end.code for end in ends] == [1, 1, 1]
    for rank in {0, 1, 2} - {victim}:
        assert f"rank {victim} (pid" in ends[rank].said and "did not come" in ends[rank].said
        assert "test_watch_processes.py" in ends[rank].said and "in hang" in ends[rank].said  # where it is
        assert WAITED in ends[rank].said
    assert "Its Python stack:" in ends[victim].said and "in hang" in ends[victim].said


@slow
def test_a_rank_that_is_frozen_is_found(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 3, reduce_for_ever, 1, freeze)
    for rank in (0, 2):
        assert ends[rank].code == 1
        assert "rank 1 (pid" in ends[rank].said and "does not answer" in ends[rank].said


@slow
def test_frozen_rank_zero_is_found(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 2, reduce_for_ever, 0, freeze)
    assert ends[1].code == 1 and "rank 0" in ends[1].said and "all-reduce of gradients" in ends[1].said


@slow
def test_sigterm_ends_all_with_a_message(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 3, reduce_for_ever, 1, be_terminated)
    assert ends[1].code == 128 + signal.SIGTERM
    assert "[rank 1] ended by SIGTERM" in ends[1].said
    assert all("rank 1 (pid" in ends[rank].said and "SIGTERM" in ends[rank].said for rank in (0, 2))


@slow
def test_a_rank_that_ends_early(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 3, reduce_for_ever, 2, go_home)
    assert ends[2].code == 0
    for rank in (0, 1):
        assert ends[rank].code == 1 and "rank 2 (pid" in ends[rank].said
        assert "ended while others still waited for it" in ends[rank].said


def some_steps_with_helpers() -> None:
    import torch

    from megatron.core.collectives import all_reduce

    dataset = torch.utils.data.TensorDataset(torch.arange(8))
    for _ in torch.utils.data.DataLoader(dataset, num_workers=1, multiprocessing_context="fork"):
        all_reduce(torch.ones(4))
    time.sleep(0.2 * torch.distributed.get_rank())  # they leave one after the other


@slow
def test_nothing_is_said_of_a_run_that_goes_well(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 3, some_steps_with_helpers, timeout=NEVER)
    assert [(end.code, end.said) for end in ends] == [(0, "")] * 3


def die_with_a_helper(victim: int) -> None:
    import torch
    import torch.distributed as dist

    from megatron.core.collectives import all_reduce

    loader = torch.utils.data.DataLoader(range(10**6), num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
    for step, _ in enumerate(loader):
        if step == 3 and dist.get_rank() == victim:
            kill_itself()
        all_reduce(torch.ones(4), what="gradients")


@slow
def test_helpers_do_not_hide_a_death(tmp_path: Path) -> None:
    """A data loader's process inherits connections, and holds them open for seconds."""
    ends = run_until_the_end(tmp_path, 2, die_with_a_helper, 1)
    assert ends[0].code == 1 and "rank 1 (pid" in ends[0].said and "died" in ends[0].said


def meet_wrongly() -> None:
    import torch
    import torch.distributed as dist

    from megatron.core.activity import communicating
    from megatron.core.collectives import all_reduce

    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    with communicating("barrier", groups[1]):
        pass
    all_reduce(torch.ones(4), group=groups[dist.get_rank()], what=f"part {dist.get_rank()}")


@slow
def test_ranks_that_wait_for_each_other(tmp_path: Path) -> None:
    ends = run_until_the_end(tmp_path, 2, meet_wrongly)
    for end in ends:
        assert end.code == 1
        assert "ranks 0 and 1 wait for each other" in end.said
        assert "rank 0 in all-reduce of part 0" in end.said and "rank 1 in all-reduce of part 1" in end.said
