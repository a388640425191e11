"""However a rank ends, the others end soon and say which rank it was and what they waited for: in simulated time."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable

import pytest

from megatron.training.failure import hub
from megatron.training.failure.clock import REAL
from megatron.training.failure.hub import ANSWER_SECONDS, SETTLE_SECONDS
from megatron.training.failure.watch import PATIENCE_SECONDS, POLL_SECONDS, SIGNAL_SECONDS
from tests.unit_tests.training.failure.simulated import FakeClock, Rank, SimulatedRun, simulate

TIMEOUT = 60.0
"""Of communications, in seconds, as simulated time is free."""
GRADIENTS = "all-reduce of gradients over all ranks 0, 1 and 2"
VICTIM_ACTS_AT = 5.0


@pytest.fixture(autouse=True)
def unix_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no options of TCP."""
    monkeypatch.setattr(hub, "tune", lambda connection: None)


def training(victim: int, act: Callable[[Rank], None]) -> Callable[[Rank], None]:
    """All three sum gradients, and after a while the victim does something else."""

    def scenario(rank: Rank) -> None:
        if rank.rank == victim:
            rank.compute("model.py:7 in forward", VICTIM_ACTS_AT)
            act(rank)
        else:
            rank.communicate(GRADIENTS, 0, 1, 2)

    return scenario


def others(run: SimulatedRun, victim: int) -> list[Rank]:
    return [rank for rank in run.ranks if rank.rank != victim]


def die(rank: Rank) -> None:
    rank.die(-9)
    rank.run.clock.block(lambda: False)


def hang(rank: Rank) -> None:
    rank.compute("slow.py:3 in hang")


def fail(rank: Rank) -> None:
    raise ValueError("--data-path holds nothing")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_death_is_known_at_once(victim: int) -> None:
    run = simulate(3, training(victim, die), TIMEOUT)
    for rank in others(run, victim):
        assert rank.code == 1
        assert rank.said.startswith(f"[rank {rank.rank}] stopping: rank {victim} (pid {100 + victim} on here) died")
        assert GRADIENTS in rank.said and rank.said.count("\n") == 1
        assert rank.ended_at <= VICTIM_ACTS_AT + SETTLE_SECONDS + POLL_SECONDS


def test_deaths_of_a_moment_are_told_together() -> None:
    def scenario(rank: Rank) -> None:
        if rank.rank == 0:
            rank.communicate(GRADIENTS, 0, 1, 2)
        rank.compute("model.py:7 in forward", VICTIM_ACTS_AT + 0.1 * rank.rank)
        die(rank)

    run = simulate(3, scenario, TIMEOUT)
    assert "rank 1 (pid 101 on here) and rank 2 (pid 102 on here) died" in run.ranks[0].said


@pytest.mark.parametrize("victim", [0, 2])
def test_the_first_failure_alone_is_explained(victim: int) -> None:
    run = simulate(3, training(victim, fail), TIMEOUT)
    assert run.ranks[victim].said == f"[rank {victim}] ValueError: --data-path holds nothing\n"
    for rank in others(run, victim):
        assert f"stopping: rank {victim} (pid" in rank.said and GRADIENTS in rank.said
        assert "failed: ValueError: --data-path holds nothing" in rank.said
    assert [rank.code for rank in run.ranks] == [1, 1, 1]


def test_all_fail_alike() -> None:
    """One rank says it whole, the others point to that one."""
    run = simulate(3, fail, TIMEOUT)
    whole = [rank for rank in run.ranks if rank.said == f"[rank {rank.rank}] ValueError: --data-path holds nothing\n"]
    assert len(whole) == 1
    for rank in others(run, whole[0].rank):
        assert rank.said.endswith("failed: ValueError: --data-path holds nothing, as here\n")
        assert f"stopping: rank {whole[0].rank} (pid" in rank.said
    assert [rank.code for rank in run.ranks] == [1, 1, 1]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_hangs_is_found_after_the_timeout(victim: int) -> None:
    run = simulate(3, training(victim, hang), TIMEOUT)
    assert [rank.code for rank in run.ranks] == [1, 1, 1]
    for rank in others(run, victim):
        assert f"rank {victim} (pid" in rank.said and "did not come" in rank.said and GRADIENTS in rank.said
        assert f"rank {victim} is at slow.py:3 in hang" in rank.said
        assert TIMEOUT <= rank.ended_at <= TIMEOUT + ANSWER_SECONDS
    assert "Its Python stack:\n  slow.py:3 in hang" in run.ranks[victim].said


def test_a_frozen_rank_does_not_answer() -> None:
    run = simulate(3, training(1, Rank.freeze), TIMEOUT)
    for rank in others(run, 1):
        assert rank.code == 1 and "rank 1 (pid 101 on here) does not answer" in rank.said
        assert rank.ended_at <= TIMEOUT + 2 * ANSWER_SECONDS + 2 * POLL_SECONDS


def test_a_frozen_rank_zero_has_the_others_end_by_themselves() -> None:
    run = simulate(3, training(0, Rank.freeze), TIMEOUT)
    for rank in others(run, 0):
        assert rank.code == 1 and "rank 0 (pid 100 on here) does not answer" in rank.said and GRADIENTS in rank.said
        assert TIMEOUT + PATIENCE_SECONDS <= rank.ended_at <= TIMEOUT + PATIENCE_SECONDS + 4 * POLL_SECONDS


def test_a_transport_that_gives_up_first_says_the_same() -> None:
    """Its own timeout ends the wait in an error before the watch would complain."""
    run = simulate(3, training(2, hang), TIMEOUT, transport_timeout=TIMEOUT / 2)
    for rank in others(run, 2):
        assert "rank 2 (pid 102 on here) did not come: rank 2 is at slow.py:3 in hang" in rank.said
        assert rank.ended_at < TIMEOUT


def test_sigterm_ends_all_with_a_message() -> None:
    def be_terminated(rank: Rank) -> None:
        rank.terminate()
        rank.compute("model.py:7 in forward")

    run = simulate(3, training(1, be_terminated), TIMEOUT)
    assert run.ranks[1].code == 128 + signal.SIGTERM
    assert run.ranks[1].said == "[rank 1] ended by SIGTERM, at model.py:7 in forward\n"
    for rank in others(run, 1):
        assert "rank 1 (pid 101 on here)" in rank.said and "SIGTERM" in rank.said


def test_sigterm_of_a_launcher_because_another_has_died_does_not_hide_the_death() -> None:
    def scenario(rank: Rank) -> None:
        if rank.rank == 2:
            rank.compute("model.py:7 in forward", VICTIM_ACTS_AT)
            for other in rank.run.ranks[:2]:
                other.terminate()
            die(rank)
        rank.communicate(GRADIENTS, 0, 1, 2)

    run = simulate(3, scenario, TIMEOUT)
    for rank in others(run, 2):
        assert "stopping: rank 2 (pid 102 on here) died" in rank.said
        assert rank.ended_at <= VICTIM_ACTS_AT + SIGNAL_SECONDS


def test_a_rank_that_ends_early() -> None:
    run = simulate(3, training(2, lambda rank: None), TIMEOUT)
    assert run.ranks[2].code == 0
    for rank in others(run, 2):
        assert rank.code == 1 and "rank 2 (pid 102 on here) ended while others still waited for it" in rank.said


def test_ranks_that_wait_for_each_other() -> None:
    def scenario(rank: Rank) -> None:
        rank.communicate(f"all-reduce of part {rank.rank}", 0, 1)

    run = simulate(2, scenario, TIMEOUT)
    for rank in run.ranks:
        assert rank.code == 1 and "ranks 0 and 1 wait for each other" in rank.said
        assert "rank 0 in all-reduce of part 0" in rank.said and "rank 1 in all-reduce of part 1" in rank.said


def test_nothing_is_said_of_a_run_that_goes_well() -> None:
    """Also when its ranks leave long after each other: the end of one that has said goodbye is no death."""
    run = simulate(3, lambda rank: rank.compute("model.py:7 in forward", 1.0 + 3.0 * rank.rank), TIMEOUT)
    assert [(rank.code, rank.said) for rank in run.ranks] == [(0, "")] * 3


def test_a_slow_step_is_no_failure() -> None:
    run = simulate(2, lambda rank: rank.compute("model.py:7 in forward", 9 * TIMEOUT), TIMEOUT)
    assert [(rank.code, rank.said) for rank in run.ranks] == [(0, "")] * 2


def test_a_fake_clock_needs_no_time() -> None:
    clock, seen = FakeClock(), []

    def nap(seconds: float) -> None:
        clock.sleep(seconds)
        seen.append(clock.now())

    for seconds in (500.0, 20.0, 300.0):
        clock.start(lambda seconds=seconds: nap(seconds))  # type: ignore[misc]
    started = REAL.now()
    clock.run()
    assert seen == [20.0, 300.0, 500.0] and REAL.now() - started < 100


def test_the_real_clock_waits_for_what_comes() -> None:
    here, there = socket.socketpair()
    there.send(b"x")
    with here, there, hub.selectors.DefaultSelector() as selector:
        selector.register(here, hub.selectors.EVENT_READ)
        assert [key.fileobj for key, _ in REAL.select(selector, 60)] == [here]
        here.recv(1)
        assert REAL.select(selector, -1.0) == []
    event = threading.Event()
    assert not REAL.wait_for(event, 0.0)
    event.set()
    assert REAL.wait_for(event, 60)
