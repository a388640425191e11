"""AdamW whose state lies in types and on devices of choice, and is computed with in fp32.

The update is torch's own fused one. State that is fp32 is updated in place, all parameters at once; other state is
widened, updated and rounded `PIECE` elements at a time, so that no fp32 copy of it is ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron.core.optimizer.host_transfers import HostTransfers
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.state_storage import (
    FORMATS,
    Allocate,
    Float32Storage,
    RemainderStorage,
    RoundedStorage,
    Storage,
)

PIECE = 2**18
"""Elements that are widened at a time: a whole number of blocks, and within a processor's cache."""

STATE_NAMES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class Slot:
    """A piece of a parameter and all that its update needs."""

    weights: Tensor
    """[n], a view of the model's parameter."""
    first: int
    """Where in the flattened parameter the piece begins."""
    param: Storage
    """The main weights."""
    exp_avg: Storage
    exp_avg_sq: Storage
    step: Tensor
    """Number of updates; on the CPU where the host needs it to choose random numbers."""
    on_host: bool
    """Whether state lies in host memory, where the update then happens, too."""

    @property
    def is_exact(self) -> bool:
        """Whether all of the state is fp32 and lies where the gradient is, so that nothing is to be converted."""
        return not self.on_host and all(isinstance(one, Float32Storage) for one in self.storages.values())

    @property
    def storages(self) -> dict[str, Storage]:
        """By the names that checkpoints give them."""
        return {"param": self.param, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def ranges(self) -> Iterable[tuple[int, int]]:
        """The piece in ranges of at most `PIECE` elements that end where blocks do."""
        start = 0
        while start < self.weights.numel():
            end = min(self.weights.numel(), start + PIECE - (self.first + start) % PIECE)
            yield start, end
            start = end

    def weights_follow(self, rounded: Tensor | None = None) -> None:
        """Make the model's weights the main ones, rounded; where they are not that anyway.

        Args:
            rounded: [n] where to round into instead, on the device of the state.
        """
        target = self.weights if rounded is None else rounded
        if isinstance(self.param, RemainderStorage) or self.shares_weights:
            return
        for start, end in self.ranges():
            target[start:end].copy_(self.param.read(start, end))

    @property
    def shares_weights(self) -> bool:
        """Whether the model's weights are themselves the main ones."""
        return isinstance(self.param, Float32Storage) and self.param.values is self.weights


class PrecisionAwareAdam(torch.optim.Optimizer):
    """AdamW over pieces of parameters, whose gradients are their `decoupled_grad`, of any type.

    `adopt` gives each piece its state; `state[piece]` is {"step", "slot"}.

    Args:
        params: groups, as of `torch.optim.AdamW`.
        config: types of the state, whether remainders stand for fp32 main weights, what lies in host memory.
    """

    def __init__(self, params: Iterable[Any], config: OptimizerConfig) -> None:
        betas = (config.adam_beta1, config.adam_beta2)
        super().__init__(
            params, {"lr": config.lr, "betas": betas, "eps": config.adam_eps, "weight_decay": config.weight_decay}
        )
        self.config = config
        self.grad_multiplier = 1.0
        """Multiplies 16-bit gradients once they are widened; fp32 ones are clipped in place."""
        self.transfers = HostTransfers(
            overlap=config.overlap_cpu_optimizer_d2h_h2d,
            pin_grads=config.pin_cpu_grads,
            pin_weights=config.pin_cpu_params,
        )

    # --- state ---

    def adopt(self, weights: Tensor, first: int, *, on_host: bool) -> None:
        """Make zero moments and main weights for a piece that is a parameter of a group from now on."""
        make = self.transfers.allocate if on_host else allocate_on(weights.device)
        moment = _Moments(weights.numel(), first, make)
        slot = Slot(
            weights=weights,
            first=first,
            param=self._main(weights, first, make, on_host=on_host),
            exp_avg=moment.of_type(self.config.exp_avg_dtype, salt=1),
            exp_avg_sq=moment.of_type(self.config.exp_avg_sq_dtype, salt=2, second_moment=True),
            step=torch.zeros((), dtype=torch.float32),
            on_host=on_host,
        )
        if slot.is_exact:
            slot.step = slot.step.to(weights.device)
        self.state[weights] = {"step": slot.step, "slot": slot}

    def _main(self, weights: Tensor, first: int, make: Allocate, *, on_host: bool) -> Storage:
        config = self.config
        is_fp32 = config.main_params_dtype == torch.float32 or weights.dtype == torch.float32
        storage: Storage
        if is_fp32 and not on_host:
            if weights.dtype == torch.float32:
                return Float32Storage(weights)
            if weights.dtype == torch.bfloat16 and config.store_param_remainders:
                return RemainderStorage(weights, make)
        if is_fp32:
            storage = Float32Storage(make(weights.numel(), torch.float32))
        else:
            storage = RoundedStorage(FORMATS[config.main_params_dtype], weights.numel(), first, make)
        storage.write(0, weights.float().to(storage.device), step=0)
        return storage

    def slot_of(self, weights: Tensor) -> Slot:
        """State of a piece that was adopted."""
        return self.state[weights]["slot"]

    def slots(self, group: dict[str, Any]) -> list[Slot]:
        """Those of a group that have a gradient."""
        return [self.slot_of(one) for one in group["params"] if getattr(one, "decoupled_grad", None) is not None]

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all pieces that have a gradient, and the model's weights with them.

        Gradients of what lies in host memory are on their way while the device updates its own share.
        """
        if closure is not None:
            raise ValueError("the gradients are in buffers; a closure cannot compute them anew")
        on_host = [(slot, _grad(slot)) for group in self.param_groups for slot in self.slots(group) if slot.on_host]
        self.transfers.begin(on_host)
        for group in self.param_groups:
            slots = [slot for slot in self.slots(group) if not slot.on_host]
            self._update_exact(group, [slot for slot in slots if slot.is_exact])
            for slot in slots:
                if not slot.is_exact:
                    self._update(group, slot, _grad(slot))
                    slot.weights_follow()
        for group in self.param_groups:
            for slot in (slot for slot in self.slots(group) if slot.on_host):
                self._update(group, slot, self.transfers.grad_on_host(slot, _grad(slot)))
                self.transfers.send_weights(slot)
        self.transfers.finish()

    def _update_exact(self, group: dict[str, Any], slots: list[Slot]) -> None:
        """In one call over the storages themselves; what is 16-bit among the weights follows."""
        if not slots:
            return
        state = [[slot.storages[name].read_all() for slot in slots] for name in STATE_NAMES]
        grads = [self._widened(_grad(slot)) for slot in slots]
        _adamw(group, state, grads, [slot.step for slot in slots])
        for slot in slots:
            slot.weights_follow()

    def _update(self, group: dict[str, Any], slot: Slot, grad: Tensor) -> None:
        step = int(slot.step) + 1
        for start, end in slot.ranges():
            state = {name: storage.read(start, end) for name, storage in slot.storages.items()}
            lists = [[value] for value in state.values()]
            _adamw(group, lists, [self._widened(grad[start:end])], [grad.new_tensor(step - 1, dtype=torch.float32)])
            for name, storage in slot.storages.items():
                storage.write(start, state[name], step)
        slot.step += 1

    def _widened(self, grad: Tensor) -> Tensor:
        return grad if grad.dtype == torch.float32 else grad.float().mul_(self.grad_multiplier)


@dataclass
class _Moments:
    numel: int
    first: int
    make: Allocate

    def of_type(self, dtype: torch.dtype, *, salt: int, second_moment: bool = False) -> Storage:
        if dtype == torch.float32:
            return Float32Storage(self.make(self.numel, dtype))
        form = FORMATS[dtype]
        return RoundedStorage(form, self.numel, self.first, self.make, salt=salt, second_moment=second_moment)


def allocate_on(device: torch.device) -> Allocate:
    """Zeros on `device`."""
    return lambda numel, dtype: torch.zeros(numel, dtype=dtype, device=device)


def _grad(slot: Slot) -> Tensor:
    return slot.weights.decoupled_grad  # type: ignore[attr-defined]


def _adamw(group: dict[str, Any], state: list[list[Tensor]], grads: list[Tensor], steps: list[Tensor]) -> None:
    """Advances `state` (main weights, first and second moments) and `steps` in place."""
    params, exp_avgs, exp_avg_sqs = state
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
