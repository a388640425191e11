"""When cached memory is returned, and what is asked of CUDA's recorder."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core import device
from megatron.training import device_memory, periodic


@pytest.mark.parametrize("asked, places", [(0, []), (1, [1]), (2, [1, 2])])
def test_memory_is_returned_at_the_places_of_the_level(
    asked: int, places: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    for place in (1, 2):
        monkeypatch.setattr(device, "release_cached_memory", lambda place=place: released.append(place))
        device_memory.release_unused(SimpleNamespace(empty_unused_memory_level=asked), place)
    assert released == places


def test_snapshot_is_written_at_each_log_by_the_last_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    args = SimpleNamespace(log_interval=2, memory_snapshot_path="here")
    for is_last in (True, False):
        monkeypatch.setattr(periodic, "is_last_rank", lambda is_last=is_last: is_last)
        for iteration in (1, 2):
            run: Any = SimpleNamespace(args=args, state=SimpleNamespace(iteration=iteration))
            periodic.write_memory_snapshot(run, None)  # type: ignore[arg-type]
    assert written == ["here"]


def test_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: started.append(settings))
    device_memory.start_memory_history()
    assert started == [{"max_entries": 100_000}]
