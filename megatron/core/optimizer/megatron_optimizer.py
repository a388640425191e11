"""What every optimizer of a training loop has: main parameters, statistics, the order of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer.clip_grads import (
    clip_coefficient,
    count_zeros_fp32,
    reduce_over,
    sum_of_squares,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.timers import timed
from megatron.core.utils import get_pg_rank
from megatron.core.vocabulary_padding import without_padding

InitStateFn = Callable[[torch.optim.Optimizer], None]
StepResult = tuple[bool, float | None, float | None]
"""Whether weights were updated, the gradient norm before clipping, zeros among the gradients (if counted)."""


class MegatronOptimizer(ABC):
    """A torch optimizer whose parameters (`main params`) stand for parameters of a model.

    `model_params[g][i]` is the model's parameter of which `param_groups[g]["params"][i]` is the fp32 main
    version: itself, a copy, or this rank's shard. `grad_stats_parallel_group` and `tensor_parallel_group` come from
    `parallel_state` unless they are set.

    Args:
        optimizer: over the model's parameters, not stepped yet.
        config: clipping and statistics; timers.
        init_state_fn: allocates the state that a first step would, so that a checkpoint can be loaded into
            it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        init_state_fn: InitStateFn = lambda optimizer: None,
    ) -> None:
        self.optimizer = optimizer
        self.config = config
        self.init_state_fn = init_state_fn
        self.model_params: list[list[Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.grad_stats_parallel_group: ProcessGroup | None = None
        self.tensor_parallel_group: ProcessGroup | None = None
        self._squares: Tensor | None = None
        """Of the gradients that this rank counts, as they lie in memory, where they have been read for it already."""
        if has_default_process_groups():
            groups = default_process_groups()
            self.grad_stats_parallel_group, self.tensor_parallel_group = groups.mp, groups.tp

    # --- parameters and gradients ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of main params; the scheduler writes `lr` and `weight_decay` into them."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """Moments by main param."""
        return self.optimizer.state

    def get_parameters(self) -> list[Tensor]:
        """Main params of all groups."""
        return [param for group in self.param_groups for param in group["params"]]

    def pairs(self) -> Iterator[tuple[Parameter, Tensor]]:
        """(model parameter, main param), group after group."""
        return zip(chain.from_iterable(self.model_params), self.get_parameters(), strict=True)

    def gradient_of(self, main: Tensor) -> Tensor | None:
        """Of a main param, once `prepare_grads` has given it one."""
        return main.grad

    def main_grads(self) -> list[Tensor]:
        """Gradients of all main params that have one."""
        grads = map(self.gradient_of, self.get_parameters())
        return [grad for grad in grads if grad is not None]

    def first_element(self, main: Tensor) -> int:
        """Where in the flattened model parameter the elements of its main param begin."""
        return 0

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """Gradients that this rank counts: every element of the model is counted by exactly one rank.

        Not those of a tied copy (`shared`), nor, except on the first tensor-parallel rank, of weights that
        all tensor-parallel ranks hold whole, nor those of rows that pad the vocabulary.
        """
        is_first_tp_rank = get_pg_rank(self.tensor_parallel_group) == 0
        return [
            without_padding(model_param, grad, self.first_element(main))
            for model_param, main in self.pairs()
            if (grad := self.gradient_of(main)) is not None
            and not getattr(model_param, "shared", False)
            and (is_first_tp_rank or getattr(model_param, "tensor_model_parallel", False))
        ]

    def get_grad_stats_parallel_group(self) -> ProcessGroup | None:
        """Ranks that together hold each gradient once."""
        return self.grad_stats_parallel_group

    def get_grad_norm(self) -> float:
        """L2 norm of the gradient of the whole model."""
        total = self.sum_of_squares()
        reduce_over(total, self.get_grad_stats_parallel_group(), dist.ReduceOp.SUM)
        return float(total.sqrt())

    def sum_of_squares(self) -> Tensor:
        """fp64 scalar: of the gradients that this rank counts."""
        squares, self._squares = self._squares, None
        if squares is None:
            squares = sum_of_squares(self.get_main_grads_for_grad_norm())
        return squares * self.grad_multiplier**2

    def clip_grad_norm(self, clip_grad: float) -> float:
        """Scale gradients so that their norm is at most `clip_grad`; returns the norm they had."""
        grad_norm = self.get_grad_norm()
        self.clip_grads(clip_grad, grad_norm)
        return grad_norm

    def clip_grads(self, max_norm: float, total_norm: float) -> None:
        """Scale this rank's gradients so that a norm of `total_norm` becomes at most `max_norm`."""
        self.multiply_grads(clip_coefficient(max_norm, total_norm))

    @property
    def grad_multiplier(self) -> float:
        """What the prepared gradients are yet to be multiplied by."""
        return getattr(self.optimizer, "grad_multiplier", 1.0)

    def multiply_grads(self, factor: float) -> None:
        """Scale this rank's gradients: when the update reads them where its rule can, else now."""
        inner: Any = self.optimizer
        if hasattr(inner, "grad_multiplier"):
            inner.grad_multiplier *= factor
        elif factor != 1.0 and (grads := self.main_grads()):
            torch._foreach_mul_(grads, factor)

    def _forget_last_grads(self) -> None:
        """What is known of gradients that no update has read."""
        inner: Any = self.optimizer
        self._squares = None
        if hasattr(inner, "grad_multiplier"):
            inner.grad_multiplier = 1.0

    def count_zeros(self) -> float:
        """Number of gradient elements of the whole model that are exactly zero."""
        return count_zeros_fp32(self.get_main_grads_for_grad_norm(), self.get_grad_stats_parallel_group())

    # --- loss scale ---

    @abstractmethod
    def get_loss_scale(self) -> Tensor:
        """fp32 [1]; what the loss is to be multiplied by before backward."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return self.get_loss_scale() * loss

    # --- the step ---

    def step(self) -> StepResult:
        """Update the weights with the gradients in the buffers, unless these overflowed."""
        if self.prepare_grads():
            return False, None, None
        grad_norm, num_zeros = self.clip_and_count()
        return self.step_with_ready_grads(), grad_norm, num_zeros

    def clip_and_count(self) -> tuple[float, float | None]:
        """Norm of the prepared gradients, which are then clipped; their zeros if they are to be counted."""
        with timed(self.config, "optimizer-clip-main-grad", log_level=1):
            clip_grad = self.config.clip_grad
            grad_norm = self.clip_grad_norm(clip_grad) if clip_grad > 0.0 else self.get_grad_norm()
        if not self.config.log_num_zeros_in_grad:
            return grad_norm, None
        with timed(self.config, "optimizer-count-zeros", log_level=1):
            return grad_norm, self.count_zeros()

    def prepare_grads(self) -> bool:
        """Give main params unscaled gradients and adapt the loss scale; True if a gradient overflowed."""
        found_inf = self.collect_grads()
        scaler = getattr(self, "grad_scaler", None)
        if scaler is not None:
            scaler.update(found_inf)
        return found_inf

    @abstractmethod
    def collect_grads(self) -> bool:
        """`prepare_grads` without adapting the loss scale."""

    def step_with_ready_grads(self) -> bool:
        """Update main params, then the model's, and let other ranks have them; True when done."""
        self.update_weights()
        gather_weights_of(self.sharded_chunks, self.config)
        return True

    @abstractmethod
    def update_weights(self) -> None:
        """Update main params, then those of the model's weights that this rank updates."""

    @property
    def sharded_chunks(self) -> Sequence[Any]:
        """Model chunks whose weights lie on other ranks, too, and must be gathered after `update_weights`."""
        return ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of main and model parameters. The buffers have `zero_grad_buffer`."""
        for model_param, main in self.pairs():
            for param in (model_param, main):
                if set_to_none:
                    param.grad = None
                elif param.grad is not None:
                    param.grad.zero_()

    @abstractmethod
    def reload_model_params(self) -> None:
        """Make the model's parameters the main ones, after they were loaded without optimizer state."""

    # --- checkpoints ---

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State as the `torch` checkpoint format stores it."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, or a loaded `sharded_state_dict`."""

    @abstractmethod
    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """State as shards of global tensors, described after the shards of the model's parameters.

        Args:
            model_sharded_state_dict: of the chunks that this optimizer updates; its `data` are the
                parameters.
            is_loading: whether the result is to be filled rather than written.
            metadata: `distrib_optim_sharding_type`.
        """


def gather_weights_of(chunks: Iterable[Any], config: OptimizerConfig) -> None:
    """Let all ranks have the weights that each has updated its part of, or begin to; see `weights_changed`."""
    chunks = list(chunks)
    if chunks:
        with timed(config, "params-all-gather", log_level=1):
            for chunk in chunks:
                chunk.weights_changed()
