"""Energy by the driver's counter, which a stand-in plays here."""

import ctypes

import pytest
import torch

from megatron.training.logging import energy
from megatron.training.logging.energy import EnergyMeter
from tests.worker_pool import run_ranks


class Driver:
    """Counts millijoules of one device."""

    def __init__(self, status: int = 0) -> None:
        self.millijoules, self.status = 5_000_000, status

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: object) -> int:
        assert uuid == b"GPU-1"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, into: object) -> int:
        into._obj.value = self.millijoules  # type: ignore[attr-defined]
        return self.status


def laps() -> list[float]:
    driver = Driver()
    meter = EnergyMeter(driver, "GPU-1")
    mine = 1 + torch.distributed.get_rank()
    driver.millijoules += 3000 * mine
    found = [meter.lap()]
    driver.millijoules += 1000
    meter.pause()
    meter.pause()
    driver.millijoules += 70_000
    meter.resume()
    driver.millijoules += 500
    return [*found, meter.lap(), meter.lap()]


def test_laps_are_means_over_ranks_and_leave_pauses_out() -> None:
    assert run_ranks(2, laps) == [[4.5, 1.5, 0.0]] * 2


def test_a_driver_that_does_not_count_is_named() -> None:
    with pytest.raises(RuntimeError, match="nvmlDeviceGetTotalEnergyConsumption .* status 3; leave --log-energy out"):
        EnergyMeter(Driver(status=3), "GPU-1")


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy.device, "device_type", lambda: "cuda")

    def fail(name: str) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert "libnvidia-ml.so.1 cannot be loaded: no such file" in str(energy.why_no_energy())
