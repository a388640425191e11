"""The public names of random streams and of recomputation; what they are is in `rng_tracker` and `recompute`."""

from __future__ import annotations

from megatron.core.tensor_parallel.recompute import (
    CheckpointFunction,
    CheckpointWithoutOutput,
    CheckpointWithoutOutputFunction,
    checkpoint,
)
from megatron.core.tensor_parallel.rng_tracker import (
    CudaRNGStatesTracker,
    get_all_rng_states,
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
    set_all_rng_states,
)

__all__ = [
    "CheckpointFunction",
    "CheckpointWithoutOutput",
    "CheckpointWithoutOutputFunction",
    "CudaRNGStatesTracker",
    "checkpoint",
    "get_all_rng_states",
    "get_cuda_rng_tracker",
    "get_data_parallel_rng_tracker_name",
    "get_expert_parallel_rng_tracker_name",
    "initialize_rng_tracker",
    "model_parallel_cuda_manual_seed",
    "set_all_rng_states",
]
