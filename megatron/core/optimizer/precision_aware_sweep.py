"""`PrecisionAwareAdam`'s update of whole blocks as one compiled kernel: state is widened, advanced and rounded while it
is at hand. The formulas are those of `state_storage`, hence the same bits are stored for the same fp32 values.

[blocks, BLOCK]: elements of a parameter from the first one of a block on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions import compiled
from megatron.core.optimizer.fused_adam import adamw, rates_of
from megatron.core.optimizer.state_storage import (
    BLOCK,
    Float32Storage,
    FloatFormat,
    RemainderStorage,
    RoundedStorage,
    Storage,
    block_exponents,
    joined,
    noise_at,
    noise_seed,
    power_of_two,
    rounded_values,
    split,
)

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Exact:
    """[blocks, BLOCK] fp32."""

    def read(self, stored: Tensors) -> Tensor:
        """fp32 values."""
        return stored[0]

    def write(self, stored: Tensors, values: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """Store fp32 `values`; returns them as they will be read."""
        stored[0].copy_(values)
        return values


@dataclass(frozen=True)
class Remainders(Exact):
    """[blocks, BLOCK] bf16 weights and int16 remainders."""

    def read(self, stored: Tensors) -> Tensor:
        return joined(*stored)

    def write(self, stored: Tensors, values: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        for target, part in zip(stored, split(values)):
            target.copy_(part)
        return values


@dataclass(frozen=True)
class Rounded(Exact):
    """[blocks, BLOCK] of the type of `form`, with exponents [blocks] int8 where it has few of its own."""

    form: FloatFormat
    second_moment: bool
    of_squares: bool

    def read(self, stored: Tensors) -> Tensor:
        return self._widened(stored[0].view(self.form.dtype), stored[1].unsqueeze(1) if len(stored) > 1 else None)

    def _widened(self, values: Tensor, exponents: Tensor | None) -> Tensor:
        wide = values.float() if exponents is None else values.float() * power_of_two(exponents)
        return wide.square() if self.of_squares else wide

    def write(self, stored: Tensors, values: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        values = values.sqrt() if self.of_squares else values
        exponents = None
        if self.form.largest_scaled is not None:
            exponents = (block_exponents(values) - self.form.largest_scaled).clamp(-126, 126).unsqueeze(1)
            values = values * power_of_two(-exponents)
            stored[1].copy_(exponents.squeeze(1))
        rounded = rounded_values(values, self.form, noise(), second_moment=self.second_moment, squares=self.of_squares)
        narrow = rounded.to(self.form.dtype)
        stored[0].copy_(narrow.view(self.form.stored_as))
        return self._widened(narrow, exponents)


def _form_of(storage: Storage) -> Exact:
    match storage:
        case RoundedStorage():
            return Rounded(storage.form, storage.second_moment, storage.of_squares)
        case RemainderStorage():
            return Remainders()
        case _:
            return Exact()


def _blocks_of(storage: Storage, start: int, end: int) -> Tensors:
    """Its tensors for elements [start, end), which are whole blocks."""
    match storage:
        case Float32Storage():
            return (storage.values[start:end].view(-1, BLOCK),)
        case RemainderStorage():
            return tuple(x[start:end].view(-1, BLOCK) for x in (storage.weights, storage.remainders))
        case RoundedStorage():
            values = storage.values[start:end].view(-1, BLOCK)
            exponents = storage.exponents_of(start, end)
            return (values,) if exponents is None else (values, exponents)
    raise TypeError(f"no kernel for {type(storage).__name__}")


@cache
def _sweep_of(param: Exact, exp_avg: Exact, exp_avg_sq: Exact) -> Callable[..., None]:
    """The update of state in these three forms."""
    forms = (param, exp_avg, exp_avg_sq)

    def update_blocks(
        grad: Tensor, weights: Tensor | None, stored: tuple[Tensors, ...], rates: Tensor, first: Tensor, seeds: Tensor
    ) -> None:
        places = torch.arange(grad.numel(), device=grad.device).view(grad.shape) + first
        wide = [form.read(tensors) for form, tensors in zip(forms, stored)]
        new = adamw(wide[0], grad, wide[1], wide[2], rates)
        kept = [
            form.write(tensors, values, partial(noise_at, places, seed))
            for form, tensors, values, seed in zip(forms, stored, new, seeds.unbind())
        ]
        if weights is not None:
            weights.copy_(kept[0])

    return update_blocks


def pays(storages: Mapping[str, Storage]) -> bool:
    """Whether the kernel is worth compiling. That for a CPU takes 16-bit integers one by one: with remainders it is up
    to three times as slow as torch's own."""
    return storages["param"].device.type != "cpu" or not isinstance(storages["param"], RemainderStorage)


def update_whole_blocks(
    storages: Mapping[str, Storage],
    weights: Tensor | None,
    grad: Tensor,
    first: int,
    span: tuple[int, int],
    step: int,
    group: Mapping[str, Any],
    multiplier: float,
) -> None:
    """Advance elements `span` of a piece, which begin with a block and end with one, to update number `step`.

    Args:
        storages: "param", "exp_avg", "exp_avg_sq" of the piece.
        weights: [n] of the piece, to be made the main weights, rounded; None where the storage does it.
        grad: [n], to be multiplied by `multiplier`.
        first: where in the flattened parameter the piece begins.
        group: rates.
    """
    start, end = span
    stores = list(storages.values())
    seeds = [noise_seed(step, store.salt if isinstance(store, RoundedStorage) else 0) for store in stores]
    device = grad.device
    numbers = torch.tensor([first + start, *seeds])
    compiled.sweep(_sweep_of(*map(_form_of, stores)))(
        grad[start:end].view(-1, BLOCK),
        None if weights is None else weights[start:end].view(-1, BLOCK),
        tuple(_blocks_of(store, start, end) for store in stores),
        rates_of(torch.tensor([float(step)]), group, multiplier)[0].to(device),
        numbers[0].to(device),
        numbers[1:].int().to(device),
    )
