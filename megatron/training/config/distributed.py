"""Processes, pipeline chunks and gradient buckets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal


def local_rank_from_environment() -> int:
    """The launcher's LOCAL_RANK, or 0 without a launcher."""
    return int(os.getenv("LOCAL_RANK", "0"))


@dataclass(kw_only=True)
class DistributedConfig:
    """What the library's parallel and data parallel configurations leave to the application."""

    encoder_tensor_model_parallel_size: int = 0
    """Tensor parallel size of an encoder before its decoder: that of the decoder, or 0, which means the same."""
    encoder_pipeline_model_parallel_size: int = 0
    """Pipeline stages of an encoder; --pipeline-model-parallel-size then counts those of its decoder."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per model chunk of an interleaved pipeline."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks per stage of an interleaved pipeline."""
    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """torch.distributed backend; without CUDA always gloo."""
    distributed_timeout_minutes: int = 10
    """Minutes after which a collective gives up."""
    align_grad_reduce: bool = True
    """All pipeline stages start reducing gradients at the same time."""
    ddp_num_buckets: int | None = None
    """Number of gradient buckets."""
    scatter_gather_tensors_in_pipeline: bool = True
    """Stages split what they send over the tensor parallel ranks; no effect, sequence parallelism does it."""
    local_rank: int = field(default_factory=local_rank_from_environment)
    """Number of this process on its machine; launchers set it as LOCAL_RANK."""
    use_sharp: bool = False
    """Reduce in the network's switches."""
    use_torch_fsdp2: bool = False
    """Shard data parallel state with torch's FSDP2."""
    torch_fsdp2_reshard_after_forward: bool = True
    """Free weights that FSDP2 has gathered after forward."""
    nccl_communicator_config_path: str | None = None
    """YAML file with NCCL settings of each process group."""
    use_tp_pp_dp_mapping: bool = False
    """Number ranks with pipeline before data parallelism."""
    replication: bool = False
    """Copy checkpoints on a node's own disk to other nodes."""
    replication_jump: int | None = None
    """Distance in ranks between copies."""
    replication_factor: int = 2
    """Number of copies."""
