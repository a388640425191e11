"""AdamW of gradients that are yet to be multiplied (loss scale, clipping) and of weights that are yet to be rounded.

torch's kernels read and write 42 bytes for a parameter with fp32 gradient, moments and main weight and a 16-bit weight:
8 to multiply, 28 to update, 6 to round. Compiled it is one kernel, which moves 30. Zeroing the gradient there, too,
would save nothing: it is written once either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions import compiled
from megatron.core.optimizer.optimizer_config import OptimizerConfig


@dataclass(eq=False)
class AdamState:
    """A parameter, or a piece of one, and what its update reads and writes."""

    main: Tensor
    """[...] fp32."""
    grad: Tensor
    """[...], fp32 or 16-bit; may be left multiplied."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """Number of updates; fp32, on the device."""
    weights: Tensor | None = None
    """[...] 16-bit: where to round `main` into."""

    @property
    def is_flat(self) -> bool:
        """Whether what is changed can be viewed as one row of elements."""
        changed = (self.main, self.exp_avg, self.exp_avg_sq, self.weights)
        return all(x is None or x.is_contiguous() for x in changed)


def update(states: Sequence[AdamState], group: Mapping[str, Any], multiplier: float, *, compile_it: bool) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2) with `multiplier` times the gradients.

    Args:
        states: pieces with the rates of `group`; changed in place, their counters too.
        group: "lr", "betas", "eps", "weight_decay".
        compile_it: by one compiled kernel for each of `states` instead of torch's kernels.
    """
    with torch.no_grad():
        flat = [compile_it and state.is_flat for state in states]
        _update_plainly([state for state, yes in zip(states, flat) if not yes], group, multiplier)
        _update_compiled([state for state, yes in zip(states, flat) if yes], group, multiplier)


def _update_plainly(states: Sequence[AdamState], group: Mapping[str, Any], multiplier: float) -> None:
    """One torch kernel after the other, each over all; fp32 gradients are left multiplied."""
    if not states:
        return
    torch._foreach_add_([state.step for state in states], 1)
    grads = [state.grad.float() for state in states]
    if multiplier != 1.0:
        torch._foreach_mul_(grads, multiplier)
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [state.main for state in states],
        grads,
        [state.exp_avg for state in states],
        [state.exp_avg_sq for state in states],
        [],
        [state.step for state in states],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    rounded = [(state.weights, state.main) for state in states if state.weights is not None]
    if rounded:
        torch._foreach_copy_([weights for weights, _ in rounded], [main for _, main in rounded])


# --- one kernel ---


def rates_of(steps: Tensor, group: Mapping[str, Any], multiplier: float) -> Sequence[Tensor]:
    """fp32 [8] for each of `steps` [n], numbers of the update: what `adamw` takes, computed in fp64."""
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    steps = steps.double()
    constant = steps.new_tensor([multiplier, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, group["eps"]])
    return torch.cat(
        [
            constant.expand(steps.numel(), -1),
            (lr / (1 - beta1**steps)).unsqueeze(1),
            (1 - beta2**steps).sqrt().unsqueeze(1),
        ],
        dim=1,
    ).float().unbind()  # fmt: skip


def adamw(
    main: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Main weights and moments after a step with `grad`, all fp32; operations in the order of torch's fused kernel.

    Args:
        rates: [8], see `rates_of`.
    """
    multiplier, shrink, share, beta2, share_of_square, eps, step_size, root_of_correction = rates.unbind()
    grad = grad.float() * multiplier
    exp_avg = exp_avg + share * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + share_of_square * grad * grad
    root = exp_avg_sq.sqrt() / root_of_correction + eps
    return main * shrink - step_size * exp_avg / root, exp_avg, exp_avg_sq


def adamw_in_place(
    main: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weights: Tensor | None, rates: Tensor
) -> None:
    """`adamw` written back, and rounded into `weights`."""
    new_main, new_exp_avg, new_exp_avg_sq = adamw(main, grad, exp_avg, exp_avg_sq, rates)
    main.copy_(new_main)
    exp_avg.copy_(new_exp_avg)
    exp_avg_sq.copy_(new_exp_avg_sq)
    if weights is not None:
        weights.copy_(new_main)


def _update_compiled(states: Sequence[AdamState], group: Mapping[str, Any], multiplier: float) -> None:
    """One kernel for each of `states`."""
    if not states:
        return
    torch._foreach_add_([state.step for state in states], 1)
    steps = torch.stack([state.step for state in states])
    kernel = compiled.sweep(adamw_in_place)
    for state, rates in zip(states, rates_of(steps, group, multiplier)):
        changed = (state.main, state.exp_avg, state.exp_avg_sq, state.weights)
        main, exp_avg, exp_avg_sq, weights = (None if x is None else x.detach().view(-1) for x in changed)
        kernel(main, state.grad.reshape(-1), exp_avg, exp_avg_sq, weights, rates)


# --- as a torch optimizer ---


class FusedAdam(torch.optim.AdamW):
    """`torch.optim.AdamW` that multiplies gradients and rounds weights, in one kernel where it is compiled.

    Args:
        param_groups: parameters that are fp32.
        config: rates; whether to compile.
    """

    def __init__(self, param_groups: Any, config: OptimizerConfig) -> None:
        assert config.lr is not None
        betas = (config.adam_beta1, config.adam_beta2)
        rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        super().__init__(param_groups, betas=betas, eps=config.adam_eps, fused=True, **rates)
        self.compile_it = config.torch_compile
        self.grad_multiplier = 1.0
        """Of the gradients of the next step; 1 after it."""
        self.weights: Mapping[Tensor, Tensor] = {}
        """Parameter -> 16-bit weights of its shape that follow it; for the next step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, and the weights that follow them."""
        if closure is not None:
            raise ValueError("the gradients are in buffers; a closure cannot compute them anew")
        for group in self.param_groups:
            states = [self._state_of(param) for param in group["params"] if param.grad is not None]
            update(states, group, self.grad_multiplier, compile_it=self.compile_it)
        self.grad_multiplier, self.weights = 1.0, {}

    def _state_of(self, param: Tensor) -> AdamState:
        init_adam_state_of(self, param)
        state = self.state[param]
        assert param.grad is not None
        return AdamState(
            param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], self.weights.get(param)
        )


def init_adam_state_of(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    """Zero moments and step counter of a parameter that has none."""
    if not optimizer.state[param]:
        optimizer.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        optimizer.state[param]["exp_avg"] = torch.zeros_like(param)
        optimizer.state[param]["exp_avg_sq"] = torch.zeros_like(param)
