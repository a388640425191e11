"""What a thread is doing can be seen from another, and every activity that ends is heard."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megatron.core import collectives
from megatron.core.activity import activity, communicating, current_activities, interrupted_by, launched, listening
from tests.worker_pool import run_ranks


def names() -> list[str]:
    return [one.name for one in current_activities()]


def test_innermost_activity_is_the_current_one() -> None:
    assert names() == []
    with activity("forward", microbatch=3) as outer:
        assert current_activities() == [outer] and outer.details == {"microbatch": 3}
        with activity("attention"):
            assert names() == ["attention"]
        assert names() == ["forward"]
    assert names() == []


def test_threads_do_not_disturb_each_other() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def save() -> None:
        with activity("save"):
            inside.set()
            go_on.wait(300)

    thread = threading.Thread(target=save)
    with activity("forward"):
        thread.start()
        inside.wait(300)
        assert names() == ["forward", "save"]
    assert names() == ["save"]
    go_on.set()
    thread.join()
    assert names() == []


def test_listener_hears_what_ends_inside_out() -> None:
    heard = []
    listener = listening(lambda one, ended: heard.append((one.name, ended - one.started)))
    with listener, activity("step"), activity("forward"):
        pass
    with activity("unheard"):
        pass
    assert [name for name, _ in heard] == ["forward", "step"]
    assert 0 <= heard[0][1] <= heard[1][1]


def test_an_exception_remembers_what_it_interrupted() -> None:
    with pytest.raises(ValueError) as failure, activity("step"), activity("receive"):
        try:
            raise KeyError("lost")
        except KeyError as error:
            raise ValueError("bad") from error
    found = interrupted_by(failure.value)
    assert found is not None and found.name == "receive"
    with pytest.raises(RuntimeError) as wrapped:
        raise RuntimeError("as seen further out") from failure.value
    assert interrupted_by(wrapped.value) is found
    assert interrupted_by(RuntimeError("another")) is None


def test_collectives_name_themselves() -> None:
    for heard in run_ranks(2, heard_collectives):
        assert heard == [
            ("all-reduce", None, "gradients", True),
            ("all-gather", None, "", True),
            ("reduce-scatter", None, "", True),
            ("broadcast", 1, "", True),
            ("all-to-all", None, "", True),
            ("all-reduce", None, "", True),
            ("all-reduce", None, "", True),
        ]


def heard_collectives() -> list[tuple[str, int | None, str, bool]]:
    heard: list[activity] = []
    x, whole = torch.ones(2), torch.empty(4)
    group = torch.distributed.new_group([0, 1])
    with listening(lambda one, ended: heard.append(one)):
        collectives.all_reduce(x, group=group, what="gradients")
        collectives.all_gather_into_tensor(whole, x, group=group)
        collectives.reduce_scatter_tensor(x, whole, group=group)
        collectives.broadcast(x, group_src=1, group=group)
        collectives.all_to_all(torch.empty_like(x), x, group=group)
        in_flight = collectives.start_all_reduce(x, group)
        in_flight.wait()
        in_flight.wait()
    assert [one.is_flight for one in heard] == [False] * 6 + [True, False]
    heard.pop()
    return [(one.name, one.peer, one.details["of"], one.waits and one.group is group) for one in heard]


def test_a_flight_is_heard_once_from_launch_to_end() -> None:
    heard: list[tuple[str, float, bool]] = []
    group = object()
    unheard = launched("all-gather", group)  # type: ignore[arg-type]
    with listening(lambda one, ended: heard.append((one.name, ended - one.started, one.is_flight))):
        landed = launched("reduce-scatter", group, of="gradients")  # type: ignore[arg-type]
        with activity("backward"):
            time.sleep(0.01)
        unheard()
    landed()  # whoever has listened at the launch hears of it
    landed()
    assert [(name, is_flight) for name, _, is_flight in heard] == [("backward", False), ("reduce-scatter", True)]
    assert heard[1][1] >= heard[0][1] >= 0.01 and names() == []


def test_a_communication_without_group_is_the_worlds() -> None:
    assert run_ranks(1, group_of_the_world) == [True]


def group_of_the_world() -> bool:
    with communicating("barrier", None) as one:
        return one.group is torch.distributed.group.WORLD
