"""The optimizer of a fully sharded model: each rank updates the rows that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel, local_part
from megatron.core.optimizer.megatron_optimizer import InitStateFn
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.state import shard_inner_state
from megatron.core.timers import timed


class FullyShardedOptimizer(FP32Optimizer):
    """Main params are the kept rows, fp32, as plain tensors: the update rule knows nothing of sharding.

    Args:
        optimizer: over the model's parameters; its groups are changed to hold the rows.
        model_chunks: that own these parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        init_state_fn: InitStateFn,
        model_chunks: Sequence[TorchFullyShardedDataParallel],
    ) -> None:
        super().__init__(optimizer, config, init_state_fn)
        rows_of = {one.param: one for chunk in model_chunks for one in chunk.rows if one.local.numel()}
        self._first_element: dict[Tensor, int] = {}
        for i, group in enumerate(optimizer.param_groups):
            kept = [rows_of[param] for param in self.model_params[i] if param in rows_of]
            self.model_params[i] = [one.param for one in kept]
            group["params"] = [one.local for one in kept]
            self._first_element.update((one.local, one.first_element) for one in kept)

    def first_element(self, main: Tensor) -> int:
        return self._first_element[main]

    def collect_grads(self) -> bool:
        self._forget_last_grads()
        with timed(self.config, "optimizer-copy-to-main-grad", log_level=1):
            for param, main in self.pairs():
                main.grad = None if param.grad is None else local_part(param.grad)
        return False

    def update_weights(self) -> None:
        with timed(self.config, "optimizer-inner-step", log_level=1):
            self.optimizer.step()

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        self.init_state_fn(self.optimizer)
        mains: list[Any] = list(chain.from_iterable(group["params"] for group in self.param_groups))
        sharded_params = get_param_id_to_sharded_param_map(model_sharded_state_dict, mains)
        return shard_inner_state(self.optimizer.state_dict(), sharded_params)
