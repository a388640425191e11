"""16-bit weights with fp32 main copies ("Mixed Precision Training", arXiv:1710.03740, section 3.1)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.clip_grads import reduce_over, sum_of_squares
from megatron.core.optimizer.fused_adam import FusedAdam
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.megatron_optimizer import InitStateFn, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.state import load_inner_state, restore_scaler, shard_inner_state
from megatron.core.timers import timed


class MixedPrecisionOptimizer(MegatronOptimizer):
    """16-bit weights (others are allowed among them), which are fp32 main params rounded after every step.

    A bf16 weight would swallow every update below 1/256 of it (arXiv:1710.03740, section 3.1).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: InitStateFn = lambda optimizer: None,
    ) -> None:
        super().__init__(optimizer, config, init_state_fn)
        if config.fp16 and grad_scaler is None:
            raise ValueError("fp16 gradients underflow without a grad_scaler")
        self.grad_scaler = grad_scaler

    def get_loss_scale(self) -> Tensor:
        if self.grad_scaler is None:
            return torch.ones(1, dtype=torch.float32, device=device.current_device())
        return self.grad_scaler.scale

    def collect_grads(self) -> bool:
        self._forget_last_grads()
        with timed(self.config, "optimizer-copy-to-main-grad", log_level=1):
            self._copy_model_grads_to_main_grads()
        if self.grad_scaler is None:
            return False
        with timed(self.config, "optimizer-unscale-and-check-inf", log_level=1):
            return self._unscale_main_grads_and_check_for_nan(self.grad_scaler)

    def _unscale_main_grads_and_check_for_nan(self, grad_scaler: MegatronGradScaler) -> bool:
        """The norm's pass over the gradients finds what is not finite; the update multiplies."""
        squares = sum_of_squares(self.get_main_grads_for_grad_norm())
        if not self._on_any_rank(~squares.isfinite()):
            self._squares = squares
            self.multiply_grads(float(grad_scaler.inv_scale))
            return False
        return self._unscale_what_may_be_finite(grad_scaler)  # squares overflow before gradients do

    def _unscale_what_may_be_finite(self, grad_scaler: MegatronGradScaler) -> bool:
        grads = self.main_grads()
        found_inf = torch.zeros(1, dtype=torch.float32, device=device.current_device())
        if grads:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, grad_scaler.inv_scale)
        return self._on_any_rank(found_inf)

    def _on_any_rank(self, flag: Tensor) -> bool:
        flag = flag.float()
        reduce_over(flag, self.get_grad_stats_parallel_group(), dist.ReduceOp.MAX)
        return bool(flag.item() > 0)

    def update_weights(self) -> None:
        inner = self.optimizer
        if isinstance(inner, FusedAdam):  # rounds, too
            inner.weights = {main: weights for weights, main in self._rounded_weights()}
        with timed(self.config, "optimizer-inner-step", log_level=1):
            inner.step()
        self._release_main_grads()
        with timed(self.config, "optimizer-copy-main-to-model-params", log_level=1):
            if isinstance(inner, FusedAdam):
                self._finish_weights()
            else:
                self._copy_main_params_to_model_params()

    def _release_main_grads(self) -> None:
        """A main param that is the model's own must not bring its gradient into the next backward."""
        for model_param, main in self.pairs():
            if main is model_param:
                main.grad = None

    def reload_model_params(self) -> None:
        self._copy_model_params_to_main_params()

    @abstractmethod
    def _copy_model_grads_to_main_grads(self) -> None: ...

    @abstractmethod
    def _rounded_weights(self) -> list[tuple[Tensor, Tensor]]:
        """(16-bit weights of the model, their main param of the same shape)."""

    def _copy_main_params_to_model_params(self) -> None:
        copy_all(*_unzip(self._rounded_weights()))
        self._finish_weights()

    def _finish_weights(self) -> None:
        """Once main params have been rounded: what else becomes of them."""

    def _copy_model_params_to_main_params(self) -> None:
        weights, mains = _unzip(self._rounded_weights())
        copy_all(mains, weights)


class Float16OptimizerWithFloat16Params(MixedPrecisionOptimizer):
    """Every data-parallel rank keeps and updates all main params."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: InitStateFn = lambda optimizer: None,
    ) -> None:
        super().__init__(optimizer, config, grad_scaler, init_state_fn)
        for group in optimizer.param_groups:
            group["params"] = [_main_version(param) for param in group["params"]]

    def _rounded_weights(self) -> list[tuple[Tensor, Tensor]]:
        return [(model_param.data, main) for model_param, main in self.pairs() if main is not model_param]

    def _copy_model_grads_to_main_grads(self) -> None:
        for model_param, main in self.pairs():
            grad = model_param.main_grad if hasattr(model_param, "main_grad") else model_param.grad
            main.grad = None if grad is None else grad.float()  # no copy when gradients are accumulated in fp32
            if main is not model_param:
                model_param.grad = None

    def _main_params_by_group(self) -> list[list[tuple[int, Tensor]]]:
        """(index of the parameter in the torch state dict, main param) of those that are copies."""
        index = iter(range(sum(map(len, self.model_params))))
        return [
            [(i, main) for model_param, main, i in zip(model_params, group["params"], index) if main is not model_param]
            for model_params, group in zip(self.model_params, self.param_groups)
        ]

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        if is_loading:
            self.init_state_fn(self.optimizer)
        state_dict: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.grad_scaler is not None:
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        state_dict["fp32_from_fp16_params"] = [[main for _, main in group] for group in self._main_params_by_group()]
        return state_dict

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        self.init_state_fn(self.optimizer)
        state_dict = self.state_dict()
        sharded_params: dict[int, Any] = get_param_id_to_sharded_param_map(
            model_sharded_state_dict, chain.from_iterable(self.model_params)
        )
        state_dict["fp32_from_fp16_params"] = [
            [make_sharded_optimizer_tensor(sharded_params[i], main, "optimizer.state.fp32_param") for i, main in group]
            for group in self._main_params_by_group()
        ]
        state_dict["optimizer"] = shard_inner_state(state_dict["optimizer"], sharded_params)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inner = _under_any_name(state_dict, "optimizer", "optimizer_state_dict")
        load_inner_state(self.optimizer, inner, self.init_state_fn)
        restore_scaler(self.grad_scaler, state_dict)
        saved_groups = _under_any_name(state_dict, "fp32_from_fp16_params", "fp32_from_fp16")
        local_groups = [[main for _, main in group] for group in self._main_params_by_group()]
        if [len(group) for group in saved_groups] != [len(group) for group in local_groups]:
            raise ValueError(
                f"main parameters per group: {[len(group) for group in saved_groups]} in the checkpoint, "
                f"{[len(group) for group in local_groups]} in this model"
            )
        with torch.no_grad():
            for main, saved in zip(chain.from_iterable(local_groups), chain.from_iterable(saved_groups)):
                main.copy_(saved)


def _main_version(param: Parameter) -> Tensor:
    """The parameter itself if it is fp32, else an fp32 copy, known to it as `main_param`."""
    if param.dtype == torch.float32:
        return param
    if param.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"a parameter has dtype {param.dtype}; the optimizer updates float32, float16 and bfloat16")
    main = param.detach().clone().float()
    param.main_param = main  # type: ignore[attr-defined]
    return main


def copy_all(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensor by tensor, rounding as the types ask."""
    if destinations:
        with torch.no_grad():
            torch._foreach_copy_(list(destinations), list(sources))


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _under_any_name(state_dict: dict[str, Any], name: str, old_name: str) -> Any:
    if name not in state_dict and old_name not in state_dict:
        raise ValueError(f"the optimizer state to load has no {name!r} (nor {old_name!r}), only {list(state_dict)}")
    return state_dict[name] if name in state_dict else state_dict[old_name]
