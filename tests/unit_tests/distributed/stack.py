"""A small stack of layers, wrapped in every form of data parallelism; shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig

FEATURES, LAYERS, BATCH = 8, 4, 4
BUCKET = FEATURES * FEATURES  # a layer's weight fills a bucket


class Stack(nn.Module):
    """Linear layers in a row. `kept[i]` False leaves a layer out, `recompute` runs them in two recomputed pieces."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)).to(dtype)
        self.kept = [True] * LAYERS
        self.recompute = False
        self.is_tied = False

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor, start: int, stop: int) -> Tensor:
            for layer, kept in list(zip(self.layers, self.kept))[start:stop]:
                x = torch.tanh(layer(x)) if kept else x
            return x

        if self.recompute:
            half = LAYERS // 2
            x = checkpoint(run, False, x.requires_grad_(), 0, half)
            x = checkpoint(run, False, x, half, LAYERS)
        else:
            x = run(x, 0, LAYERS)
        return nn.functional.linear(x, self.layers[0].weight) if self.is_tied else x


def wrap(model: nn.Module, *, per_token: bool = False, **ddp: Any) -> DistributedDataParallel:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=per_token)
    return DistributedDataParallel(config, DistributedDataParallelConfig(**{"bucket_size": BUCKET, **ddp}), model)


def optimizer_of(chunks: list[DistributedDataParallel], **settings: Any) -> MegatronOptimizer:
    dtype = next(chunks[0].parameters()).dtype
    settings = {"lr": 0.05, "weight_decay": 0.1, "clip_grad": 0.0, "use_distributed_optimizer": True, **settings}
    config = OptimizerConfig(bf16=dtype == torch.bfloat16, params_dtype=dtype, **settings)
    return get_megatron_optimizer(config, chunks)


def batch(step: int, microbatch: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * microbatch + parallel_state.get_data_parallel_rank())
    return torch.randn(BATCH, FEATURES, generator=generator)


def backward(ddp: DistributedDataParallel, step: int, microbatches: int = 2) -> None:
    """The microbatches of a step; the last one may reduce."""
    ddp.zero_grad_buffer()

    def run(microbatch: int) -> None:
        ddp(batch(step, microbatch).to(next(ddp.parameters()).dtype)).float().square().sum().backward()

    with ddp.no_sync():
        for microbatch in range(microbatches - 1):
            run(microbatch)
    run(microbatches - 1)


def owned_grads(ddp: DistributedDataParallel) -> list[Tensor]:
    """The reduced part of every bucket, whatever the partition: by position in the buffer."""
    if not ddp.ddp_config.use_distributed_optimizer:
        return [buffer.grad_data.clone() for buffer in ddp.param_and_grad_buffers]
    return [
        bucket.shard(bucket.grad_data, buffer.data_parallel_group).clone()
        for buffer in ddp.param_and_grad_buffers
        for bucket in buffer.buckets
    ]


def train(ddp: DistributedDataParallel, optimizer: MegatronOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(ddp, step)
        ddp.finish_grad_sync()
        assert optimizer.step()[0]
