"""The one module that knows which kind of device this process computes on.

Everything else asks here, so the same code runs on CPU over gloo and on GPUs over nccl.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def device_type() -> str:
    """`"cuda"`, `"xpu"`, … if torch sees an accelerator that is present, else `"cpu"`."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    return "cpu"


def is_cpu() -> bool:
    """Whether this process computes on the CPU."""
    return device_type() == "cpu"


def device_count() -> int:
    """Number of accelerators of this machine; 1 on a machine that has none."""
    return 1 if is_cpu() else _module().device_count()


def current_device() -> torch.device:
    """The device on which this rank allocates parameters and activations."""
    if is_cpu():
        return torch.device("cpu")
    return torch.device(device_type(), _module().current_device())


def set_device(local_rank: int) -> None:
    """Bind this process to accelerator `local_rank` of its machine; does nothing on CPU."""
    if not is_cpu():
        _module().set_device(local_rank)


def communication_backend() -> str:
    """The torch.distributed backend that fits the device."""
    return {"cuda": "nccl", "xpu": "xccl"}.get(device_type(), "gloo")


def synchronize() -> None:
    """Wait until the device has finished all work queued so far; immediate on CPU."""
    if not is_cpu():
        _module().synchronize()


def _module() -> Any:
    """`torch.cuda` or its like; its functions are older than those of `torch.accelerator` and named alike."""
    return torch.get_device_module(device_type())


def _generator_module() -> Any:
    return torch if is_cpu() else _module()


def default_rng_state() -> Tensor:
    """State of the generator from which dropout on this device draws."""
    return _generator_module().get_rng_state()


def set_default_rng_state(state: Tensor) -> None:
    """Restore a state returned by `default_rng_state`."""
    _generator_module().set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the generator of this device only (the CPU one stays as it is when there is an accelerator)."""
    _generator_module().manual_seed(seed)


def to_computing_type(x: Tensor) -> Tensor:
    """`x` in a type that its device multiplies fast: fp16 on a CPU becomes fp32, all else stays.

    CPUs emulate fp16 products, at 1/4 (measured with AVX-512) to 1/200 of the speed of fp32.
    """
    return x.float() if x.dtype is torch.float16 and x.device.type == "cpu" else x


def release_cached_memory() -> None:
    """Give memory that torch's allocator keeps for later back to the driver; a CPU's allocator keeps none."""
    if not is_cpu():
        _module().empty_cache()


def memory_stats() -> dict[str, int]:
    """Bytes in use as the device's allocator counts them: `allocated`, `max_allocated`, `reserved`, `max_reserved`.

    On CPU the resident set size of the process stands for `allocated` and `reserved`, its peak for the
    maxima.
    """
    if is_cpu():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * resource.getpagesize()
        return {"allocated": resident, "max_allocated": peak, "reserved": resident, "max_reserved": peak}
    stats = _module().memory_stats()
    return {
        "allocated": stats.get("allocated_bytes.all.current", 0),
        "max_allocated": stats.get("allocated_bytes.all.peak", 0),
        "reserved": stats.get("reserved_bytes.all.current", 0),
        "max_reserved": stats.get("reserved_bytes.all.peak", 0),
    }
