"""Settings of torch's fully sharded data parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig


@dataclass
class TorchFullyShardedDataParallelConfig(DistributedDataParallelConfig):
    """Settings of `TorchFullyShardedDataParallel`."""

    reshard_after_forward: bool | int = True
    """Free gathered weights after forward, to gather them again for backward; a number reshards to that many ranks."""
