"""The distributed optimizer whose state lies in types and on devices of choice (`PrecisionAwareAdam`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, ParamShard, own_shards
from megatron.core.optimizer.precision_aware_adam import PrecisionAwareAdam
from megatron.core.timers import timed


class PrecisionAwareDistributedOptimizer(DistributedOptimizer):
    """Main params are views of the weights that this rank updates; their fp32 values are the inner optimizer's.

    Checkpoints hold the values of main weights and moments in fp32, whatever type they lie in: runs with other types,
    and the ordinary distributed optimizer, continue from them.
    """

    optimizer: PrecisionAwareAdam

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for buffer in self.buffers:
            self._require_gradients_of_type(buffer)
        fraction = self.config.optimizer_offload_fraction if self.config.optimizer_cpu_offload else 0.0
        on_host = choose_share([shard.main.numel() for shard in self.shards], fraction)
        for i, shard in enumerate(self.shards):
            self.optimizer.adopt(shard.main, shard.start, on_host=i in on_host)

    def _cut(self, buffer: _ParamAndGradBuffer) -> list[ParamShard]:
        return own_shards(buffer, widen=False)

    def _keep_weights_in_fp8(self) -> None:
        if any(buffer.in_fp8 for buffer in self.buffers):
            raise ValueError(
                "fp8_param_gather does not work with use_precision_aware_optimizer: it updates bf16 in place"
            )

    def _require_gradients_of_type(self, buffer: _ParamAndGradBuffer) -> None:
        wanted = self.config.main_grads_dtype
        if wanted != torch.float32 and buffer.param_dtype != torch.float32 and buffer.grad_dtype != wanted:
            raise ValueError(
                f"main_grads_dtype ({wanted}), but gradients of {buffer.param_dtype} weights are accumulated in "
                f"{buffer.grad_dtype}: set grad_reduce_in_fp32=False in DistributedDataParallelConfig, or "
                "main_grads_dtype to torch.float32"
            )

    # --- gradients ---

    def gradient_of(self, main: Tensor) -> Tensor | None:
        return getattr(main, "decoupled_grad", None)

    def _copy_model_grads_to_main_grads(self) -> None:
        """A view of the buffer where that has the type asked for."""
        for shard in self.shards:
            grad = shard.grad_piece
            if self.config.main_grads_dtype == torch.float32:
                grad = grad.float()
            shard.main.decoupled_grad = grad  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for main in self.get_parameters():
            main.decoupled_grad = None  # type: ignore[attr-defined]

    # --- weights ---

    def update_weights(self) -> None:
        """Update the owned pieces, once gathered weights have arrived around them; the model's weights with them."""
        for chunk in self.model_chunks:
            chunk.settle_param_sync()
        with timed(self.config, "optimizer-inner-step", log_level=1):
            self.optimizer.step()

    def _copy_main_params_to_model_params(self) -> None:
        for shard in self.shards:
            self.optimizer.slot_of(shard.main).weights_follow()

    def _copy_model_params_to_main_params(self) -> None:
        for shard in self.shards:
            slot = self.optimizer.slot_of(shard.main)
            slot.param.write(0, shard.main.float().to(slot.param.device), step=0)

    # --- checkpoints ---

    def param_state(self, shard: ParamShard) -> dict[str, Tensor]:
        storages = self.optimizer.slot_of(shard.main).storages
        return {name: storage.read_all() for name, storage in storages.items()}

    def fill_param_state(self, shard: ParamShard, name: str, values: Tensor) -> None:
        storage = self.optimizer.slot_of(shard.main).storages[name]
        with torch.no_grad():
            storage.write(0, values.float().to(storage.device), step=0)


def choose_share(sizes: Sequence[int], fraction: float) -> set[int]:
    """Numbers of those pieces, the largest first, that together fill `fraction` of all without exceeding it.

    >>> sorted(choose_share([20, 30, 40, 10], 0.6))
    [0, 2]
    """
    room = fraction * sum(sizes)
    chosen = set()
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] <= room:
            chosen.add(i)
            room -= sizes[i]
    return chosen
