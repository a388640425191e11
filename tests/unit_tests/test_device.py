"""The device of this process, whichever that is."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch

from megatron.core import device


@pytest.fixture(autouse=True)
def same_generator_afterwards() -> Iterator[None]:
    state = device.default_rng_state()
    yield
    device.set_default_rng_state(state)


def draw() -> list[float]:
    return torch.rand(3, device=device.current_device()).tolist()


def test_the_device_is_the_accelerator_if_there_is_one() -> None:
    assert device.is_cpu() == (not torch.accelerator.is_available())
    assert device.current_device().type == device.device_type()
    assert device.device_count() >= 1
    expected = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
    assert device.communication_backend() == expected[device.device_type()]


def test_choosing_and_waiting_for_the_device() -> None:
    device.set_device(0)
    assert device.current_device() in (torch.device("cpu"), torch.device(device.device_type(), 0))
    device.synchronize()


def test_seeds_repeat_what_is_drawn() -> None:
    device.manual_seed(5)
    first = draw()
    assert draw() != first
    device.manual_seed(5)
    assert draw() == first


def test_states_repeat_what_is_drawn() -> None:
    state = device.default_rng_state()
    first = draw()
    device.set_default_rng_state(state)
    assert draw() == first


def test_memory_grows_with_what_is_allocated() -> None:
    before = device.memory_stats()
    assert sorted(before) == ["allocated", "max_allocated", "max_reserved", "reserved"]
    size = 64 << 20
    if device.device_type() == "cpu":  # pages of its own: torch may have kept freed ones of an earlier test
        block = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32).fill_(1)
    else:
        block = torch.ones(size // 4, device=device.current_device())
    after = device.memory_stats()
    assert after["allocated"] - before["allocated"] > 0.9 * size
    assert after["max_allocated"] >= after["allocated"] - (1 << 20)  # two readings of a moving number
    assert after["max_reserved"] >= before["max_reserved"]
    assert block.numel() == size // 4
