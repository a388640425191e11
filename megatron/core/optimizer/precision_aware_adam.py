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

from megatron.core.optimizer.fused_adam import AdamState, update
from megatron.core.optimizer.host_transfers import HostTransfers
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.precision_aware_sweep import pays, update_whole_blocks
from megatron.core.optimizer.state_storage import (
    BLOCK,
    FORMATS,
    Allocate,
    Float32Storage,
    RemainderStorage,
    RoundedStorage,
    Storage,
)

PIECE = 2**18
"""Elements that are widened at a time: a whole number of blocks, and within a processor's cache."""


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

    def ranges(self, without: tuple[int, int] = (0, 0)) -> Iterable[tuple[int, int]]:
        """The piece except for elements [start, end) in ranges of at most `PIECE` elements that end where blocks do."""
        for start, last in ((0, without[0]), (without[1], self.weights.numel())):
            while start < last:
                end = min(last, start + PIECE - (self.first + start) % PIECE)
                yield start, end
                start = end

    @property
    def whole_blocks(self) -> tuple[int, int]:
        """Elements [start, end) of the piece whose blocks lie within it."""
        start = -self.first % BLOCK
        return start, start + max(0, self.weights.numel() - start) // BLOCK * BLOCK

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
        """Of the gradients of the next step; 1 after it."""
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
        for group in self.param_groups:
            for slot in (slot for slot in self.slots(group) if slot.on_host):
                self._update(group, slot, self.transfers.grad_on_host(slot, _grad(slot)))
                self.transfers.send_weights(slot)
        self.transfers.finish()
        self.grad_multiplier = 1.0

    def _update_exact(self, group: dict[str, Any], slots: list[Slot]) -> None:
        """In the storages themselves; what is 16-bit among the weights follows."""
        if not slots:
            return
        states = [
            AdamState(
                slot.param.read_all(),
                _grad(slot),
                slot.exp_avg.read_all(),
                slot.exp_avg_sq.read_all(),
                slot.step,
                None if slot.shares_weights else slot.weights,
            )
            for slot in slots
        ]
        update(states, group, self.grad_multiplier, compile_it=self.config.torch_compile)

    def _update(self, group: dict[str, Any], slot: Slot, grad: Tensor) -> None:
        """One update of a piece, and of its weights where they lie beside its state."""
        step = int(slot.step) + 1
        beside = slot.on_host or slot.shares_weights or isinstance(slot.param, RemainderStorage)
        weights = None if beside else slot.weights
        blocks = slot.whole_blocks if self.config.torch_compile and pays(slot.storages) else (0, 0)
        if blocks[0] < blocks[1]:
            update_whole_blocks(slot.storages, weights, grad, slot.first, blocks, step, group, self.grad_multiplier)
        for start, end in slot.ranges(without=blocks):
            state = {name: storage.read(start, end) for name, storage in slot.storages.items()}
            count = grad.new_tensor(step - 1, dtype=torch.float32)
            piece = AdamState(state["param"], grad[start:end], state["exp_avg"], state["exp_avg_sq"], count)
            update([piece], group, self.grad_multiplier, compile_it=False)
            for name, storage in slot.storages.items():
                storage.write(start, state[name], step)
            if weights is not None:
                weights[start:end].copy_(slot.param.read(start, end))
        slot.step += 1


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
