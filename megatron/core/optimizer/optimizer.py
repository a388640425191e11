"""The optimizers that a training loop steps.

Each wraps a torch optimizer over fp32 tensors and adds what training at scale needs around its update:
gradients in buffers, loss scaling, the norm over all ranks, checkpoints that know no layout.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.optimizer.chained_optimizer import ChainedOptimizer, ProxyDict
from megatron.core.optimizer.megatron_optimizer import MegatronOptimizer
from megatron.core.optimizer.mixed_precision_optimizer import (
    Float16OptimizerWithFloat16Params,
    MixedPrecisionOptimizer,
)
from megatron.core.optimizer.state import load_inner_state, shard_inner_state
from megatron.core.timers import timed

__all__ = [
    "ChainedOptimizer",
    "FP32Optimizer",
    "Float16OptimizerWithFloat16Params",
    "MegatronOptimizer",
    "MixedPrecisionOptimizer",
    "ProxyDict",
]


class FP32Optimizer(MegatronOptimizer):
    """fp32 weights, updated in place."""

    def get_loss_scale(self) -> Tensor:
        return torch.ones(1, dtype=torch.float32, device=device.current_device())

    def collect_grads(self) -> bool:
        self._forget_last_grads()
        with timed(self.config, "optimizer-copy-to-main-grad", log_level=1):
            for param, _ in self.pairs():
                if hasattr(param, "main_grad"):
                    param.grad = param.main_grad
        return False

    def update_weights(self) -> None:
        with timed(self.config, "optimizer-inner-step", log_level=1):
            self.optimizer.step()
        for param, _ in self.pairs():
            if hasattr(param, "main_grad"):
                param.grad = None  # the next backward must not accumulate into the buffer a second time

    def reload_model_params(self) -> None:
        """The model's parameters are the main ones."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_inner_state(self.optimizer, state_dict, self.init_state_fn)

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        self.init_state_fn(self.optimizer)
        sharded_params = get_param_id_to_sharded_param_map(
            model_sharded_state_dict, chain.from_iterable(self.model_params)
        )
        return shard_inner_state(self.optimizer.state_dict(), sharded_params)
