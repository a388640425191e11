"""Random streams that are the same, or different, across tensor parallel ranks as the mathematics demands.

Dropout of a tensor that every rank holds whole draws from the device's default generator, seeded alike on all
ranks of a tensor parallel group. Dropout of a sharded tensor draws from the stream `model-parallel-rng`,
seeded differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.tensor_parallel.initialization import set_initialization_seed
from megatron.core.utils import get_pg_rank

_MODEL_PARALLEL_RNG_TRACKER_NAME = "model-parallel-rng"
_EXPERT_PARALLEL_RNG_TRACKER_NAME = "expert-parallel-rng"
_DATA_PARALLEL_RNG_TRACKER_NAME = "data-parallel-rng"


def get_expert_parallel_rng_tracker_name() -> str:
    """Name of the stream of expert weights."""
    return _EXPERT_PARALLEL_RNG_TRACKER_NAME


def get_data_parallel_rng_tracker_name() -> str:
    """Name of the stream that is equal on all tensor parallel ranks."""
    return _DATA_PARALLEL_RNG_TRACKER_NAME


class CudaRNGStatesTracker:
    """Named generator states of this rank's device, CPU included (the public name says CUDA).

    Args:
        is_inference_rng_tracker: make `fork` do nothing.
    """

    def __init__(self, use_cudagraphable_rng: bool = False, is_inference_rng_tracker: bool = False) -> None:
        if use_cudagraphable_rng:
            raise NotImplementedError("use_cudagraphable_rng is not built yet; leave it out")
        self.is_inference_rng_tracker = is_inference_rng_tracker
        self.reset()

    def reset(self) -> None:
        """Forget all streams."""
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def is_initialized(self) -> bool:
        """Whether there is any stream."""
        return bool(self.states_)

    def get_states(self) -> dict[str, Tensor]:
        """The state of every stream by name."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Continue the streams from `get_states`."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Start stream `name` from `seed`.

        Raises:
            ValueError: the name or the seed is taken; two streams of one seed would be correlated.
        """
        if seed in self.seeds_:
            raise ValueError(f"seed {seed} is already used by another random stream")
        if name in self.states_:
            raise ValueError(f"random stream {name!r} exists already")
        self.seeds_.add(seed)
        outside = device.default_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.default_rng_state()
        device.set_default_rng_state(outside)

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from stream `name` inside the block."""
        if self.is_inference_rng_tracker:
            yield
            return
        if name not in self.states_:
            raise RuntimeError(
                f"there is no random stream {name!r}: call tensor_parallel.model_parallel_cuda_manual_seed(seed) first"
            )
        outside = device.default_rng_state()
        device.set_default_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.default_rng_state()
            device.set_default_rng_state(outside)


_tracker: CudaRNGStatesTracker | None = None


def initialize_rng_tracker(
    use_te_rng_tracker: bool = False,
    inference_rng_tracker: bool = False,
    use_cudagraphable_rng: bool = False,
    force_reset: bool = False,
) -> None:
    """Make the process-wide tracker; keeps an existing one unless `force_reset`."""
    global _tracker
    if use_te_rng_tracker:
        raise NotImplementedError("use_te_rng_tracker needs Transformer Engine, which is not built in yet")
    if _tracker is None or force_reset:
        _tracker = CudaRNGStatesTracker(use_cudagraphable_rng, inference_rng_tracker)


def get_cuda_rng_tracker(
    use_te_rng_tracker: bool = False, inference_rng_tracker: bool = False, use_cudagraphable_rng: bool = False
) -> CudaRNGStatesTracker:
    """The process-wide tracker."""
    initialize_rng_tracker(use_te_rng_tracker, inference_rng_tracker, use_cudagraphable_rng)
    assert _tracker is not None
    return _tracker


def model_parallel_cuda_manual_seed(
    seed: int,
    te_rng_tracker: bool = False,
    inference_rng_tracker: bool = False,
    use_cudagraphable_rng: bool = False,
    tp_rank: int | None = None,
    ep_rank: int | None = None,
    etp_rank: int | None = None,
) -> None:
    """Seed the device's generator and start the three streams of this rank; initial weights derive from `seed` too.

    Streams: data-parallel `seed`, model-parallel `seed + 2718 + tp_rank`, expert-parallel
    `seed + 1024 + 100 * ep_rank + etp_rank`.
    """
    groups = default_process_groups() if has_default_process_groups() else None
    tp_rank = tp_rank if tp_rank is not None else get_pg_rank(groups.tp if groups else None)
    ep_rank = ep_rank if ep_rank is not None else get_pg_rank(groups.ep if groups else None)
    etp_rank = etp_rank if etp_rank is not None else get_pg_rank(groups.expt_tp if groups else None)
    initialize_rng_tracker(te_rng_tracker, inference_rng_tracker, use_cudagraphable_rng, force_reset=True)
    set_initialization_seed(seed)
    device.manual_seed(seed)
    tracker = get_cuda_rng_tracker()
    tracker.add(_DATA_PARALLEL_RNG_TRACKER_NAME, seed)
    tracker.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, seed + 2718 + tp_rank)
    tracker.add(_EXPERT_PARALLEL_RNG_TRACKER_NAME, seed + 1024 + 100 * ep_rank + etp_rank)


def mixed_seed(seed: int, *numbers: int) -> int:
    """A seed of 63 bits for each tuple of numbers, all of whose bits depend on all of theirs (SplitMix64's finaliser:
    Steele et al., OOPSLA 2014). torch's generator on a CPU looks at 32 bits of a seed only."""
    for number in numbers:
        seed = (seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**64
        seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ seed >> 27) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed % 2**63


@contextmanager
def forked_stream(number: int) -> Iterator[None]:
    """Draw from a stream of its own for each `number` inside the block; outside, one number has been drawn, whatever
    happens inside. So ranks whose generators agree draw differently here and agree again afterwards."""
    seed = int(torch.randint(2**62, (), device=device.current_device()))
    outside = device.default_rng_state()
    device.manual_seed(mixed_seed(seed, number))
    try:
        yield
    finally:
        device.set_default_rng_state(outside)


RNGStates = tuple[Tensor, Tensor, dict[str, Tensor]]


def get_all_rng_states() -> RNGStates:
    """States of the CPU generator, the device's generator and all streams."""
    return torch.get_rng_state(), device.default_rng_state(), get_cuda_rng_tracker().get_states()


def set_all_rng_states(states: RNGStates) -> None:
    """Restore what `get_all_rng_states` returned."""
    cpu, default, streams = states
    torch.set_rng_state(cpu)
    device.set_default_rng_state(default)
    get_cuda_rng_tracker().set_states(streams)


@contextmanager
def replayed_rng(states: RNGStates) -> Iterator[None]:
    """Inside, every generator continues from `states`; outside nothing has happened."""
    outside = get_all_rng_states()
    set_all_rng_states(states)
    try:
        yield
    finally:
        set_all_rng_states(outside)
