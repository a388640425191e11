"""A tiny model trained with every kind of optimizer; shared by the tests of this folder."""

from typing import Any

import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

FEATURES, HIDDEN, BATCH = 13, 37, 8  # odd sizes, so that shards cut through parameters


class TinyModel(nn.Sequential):
    """Linear, norm, linear: weights, biases and 1-D parameters."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(FEATURES, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 5))

    def sharded_state_dict(self, prefix: str = "", *unused: Any) -> dict[str, ShardedTensor]:
        replica = (0, 0, parallel_state.get_data_parallel_rank())
        return {
            prefix + name: ShardedTensor.from_rank_offsets(prefix + name, param, replica_id=replica)
            for name, param in self.named_parameters()
        }


def build(
    dtype: torch.dtype = torch.float32, *, sharded: bool = False, fp32_grads: bool = True, **optimizer: Any
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Replica and optimizer; process groups exist already."""
    model = TinyModel().to(dtype)
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=sharded, grad_reduce_in_fp32=fp32_grads),
        model,
    )
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "use_distributed_optimizer": sharded,
        **optimizer,
    }
    settings.update(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, params_dtype=dtype)
    return ddp, get_megatron_optimizer(OptimizerConfig(**settings), [ddp])


def train(
    ddp: DistributedDataParallel, optimizer: MegatronOptimizer, steps: range, *, blow_up: tuple[int, ...] = ()
) -> list[tuple[bool, float | None, float | None]]:
    """Results of the steps, on this rank's share of the batches; gradients overflow in steps `blow_up`."""
    results = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, FEATURES, generator=generator), torch.randn(BATCH, 5, generator=generator)
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        optimizer.zero_grad()
        ddp.zero_grad_buffer()
        out = ddp(x.to(next(ddp.parameters()).dtype)).float()
        optimizer.scale_loss((out - y).square().mean()).backward()
        if step in blow_up and rank == ranks - 1:
            next(ddp.module.parameters()).main_grad[0, 0] = float("inf")
        ddp.finish_grad_sync()
        results.append(optimizer.step())
    return results


def weights(ddp: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: param.detach().float().clone() for name, param in ddp.module.named_parameters()}
