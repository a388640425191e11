"""Energy that the CUDA device of this rank uses, as the driver counts it (NVML), for `--log-energy`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from megatron.core import device
from megatron.core.collectives import all_reduce

LIBRARY = "libnvidia-ml.so.1"


def why_no_energy() -> str | None:
    """Why energy cannot be measured here; None if it can."""
    if device.device_type() != "cuda":
        return f"energy is counted by NVIDIA's driver, and this run computes on {device.device_type()}"
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"the driver's library {LIBRARY} cannot be loaded: {error}"
    return None


class EnergyMeter:
    """Joules used while it runs. Devices count from Volta on.

    Raises:
        RuntimeError: the driver does not count for this device.
    """

    def __init__(self, library: Any = None, uuid: str | None = None) -> None:
        self._library = library or ctypes.CDLL(LIBRARY)
        self._call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        uuid = uuid or f"GPU-{torch.cuda.get_device_properties(device.current_device()).uuid}"
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))
        self._used = 0.0
        self._since: float | None = self._counter()

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function} of {LIBRARY} failed with status {status}; leave --log-energy out")

    def _counter(self) -> float:
        """Joules since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
        return millijoules.value / 1000

    def pause(self) -> None:
        """What is used until `resume` does not count."""
        if self._since is not None:
            self._used += self._counter() - self._since
            self._since = None

    def resume(self) -> None:
        """Count again."""
        if self._since is None:
            self._since = self._counter()

    def lap(self) -> float:
        """Joules since the last lap, mean over all ranks. Communicates: all-reduce over the world."""
        running = self._since is not None
        self.pause()
        used = torch.tensor(self._used, dtype=torch.float64, device=device.current_device())
        self._used = 0.0
        if running:
            self.resume()
        all_reduce(used, what="energy")
        return float(used) / torch.distributed.get_world_size()
