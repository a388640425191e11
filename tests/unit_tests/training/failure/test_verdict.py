"""Who is blamed when ranks wait in vain."""

from __future__ import annotations

import json

from megatron.training.activity_names import spoken
from megatron.training.failure.state import RankState, Wait
from megatron.training.failure.verdict import Member, judge

MEMBERS = {rank: Member(rank, 100 + rank, "here") for rank in range(4)}


def computes(at: str = "model.py:7 in forward") -> RankState:
    return RankState(None, at)


def waits(what: str, *group: int, rank: int, on: tuple[int, ...] | None = None, is_over: bool = False) -> RankState:
    needed = tuple(other for other in group if other != rank) if on is None else on
    return RankState(Wait(what, needed, group, 9.0, is_over), "collectives.py:1 in all_reduce")


def test_who_does_not_come_is_to_blame_and_where_it_is() -> None:
    states = {rank: waits("all-reduce", 0, 1, 2, 3, rank=rank) for rank in (0, 1, 3)} | {2: computes()}
    verdict = judge(MEMBERS, states, frozenset({0}))
    assert verdict.ranks == (2,)
    assert verdict.reason == "rank 2 (pid 102 on here) did not come: rank 2 is at model.py:7 in forward"


def test_blame_passes_along_the_chain_of_waits() -> None:
    """0 waits for 1, which waits for 2, which computes; so does 3, for whom nobody waits."""
    states = {
        0: waits("receive", 0, 1, rank=0),
        1: waits("receive", 1, 2, rank=1, on=(2,)),
        2: computes("slow.py:1 in spin"),
        3: computes(),
    }
    assert judge(MEMBERS, states, frozenset({0})).ranks == (2,)


def test_silence_is_worse_than_absence() -> None:
    states = {0: waits("all-reduce", 0, 1, rank=0), 1: computes(), 2: computes()}
    verdict = judge(MEMBERS, states, frozenset({0}))
    assert verdict.ranks == (3,) and "rank 3 (pid 103 on here) does not answer" in verdict.reason


def test_a_rank_that_went_home_early() -> None:
    states = {rank: waits("barrier", 0, 1, 2, 3, rank=rank) for rank in (0, 1, 2)}
    verdict = judge(MEMBERS, states, frozenset({1}), left=frozenset({3}))
    assert verdict.ranks == (3,) and "ended while others still waited" in verdict.reason


def test_ranks_that_wait_for_each_other() -> None:
    states = {
        0: waits("all-reduce over the tensor parallel ranks 0 and 1", 0, 1, rank=0),
        1: waits("receive from rank 0", 0, 1, rank=1, on=(0,)),
        2: computes(),
        3: computes(),
    }
    verdict = judge(MEMBERS, states, frozenset({1}))
    assert verdict.ranks == (0, 1)
    assert verdict.reason == (
        "ranks 0 and 1 wait for each other: rank 0 in all-reduce over the tensor parallel ranks 0 and 1; "
        "rank 1 in receive from rank 0"
    )


def test_all_in_one_communication_that_breaks_is_the_networks_fault() -> None:
    states = {rank: waits("all-reduce over all ranks", 0, 1, 2, 3, rank=rank, is_over=rank == 1) for rank in range(4)}
    assert "network" in judge(MEMBERS, states, frozenset({1})).reason


def test_state_travels() -> None:
    for state in (computes(), waits("all-gather", 0, 2, rank=0, is_over=True)):
        assert RankState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_many_ranks_are_summed_up() -> None:
    assert spoken([3]) == "rank 3"
    assert spoken([0, 2, 4]) == "ranks 0, 2 and 4"
    assert spoken(range(64)) == "ranks 0, 1, 2, … 63 (64 of them)"
