"""One value for each parameter, kept in fewer bytes than the fp32 that it is computed in.

A value that lies between two representable ones becomes one of them at random, so that it is right on average:
rounded to the nearest, a bf16 second moment with beta2 = 0.999 would never shrink, and a 16-bit weight would ignore
every small update (stochastic rounding: Gupta et al., arXiv:1502.02551; for optimizer states: arXiv:2010.06192).
The random numbers are a function of the step and of the element's place in its parameter: a resumed run repeats
them, and so does a replica.

fp16 and fp8 have few exponents. They hold values divided by a power of two of their own for each `BLOCK` elements
of the parameter ("8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2.1). Powers of two
lose nothing, hence what has been read can be written again without change.

n: elements of the piece of a parameter that is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Elements that share a scale, 1 byte."""

_LOW_16_BITS, _LOW_24_BITS, _EXPONENT_BITS = 0xFFFF, 0xFFFFFF, 0x7F800000

Allocate = Callable[[int, torch.dtype], Tensor]
"""(elements, type) -> zeros where the state is to lie."""


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point type: its grid of values, and the power of two that a block's largest value is scaled to."""

    dtype: torch.dtype
    stored_as: torch.dtype
    mantissa_bits: int
    smallest_exponent: int
    """Of a normal number."""
    largest_scaled: int | None
    """Blocks are scaled into (2^(largest_scaled - 1), 2^largest_scaled]; None: unscaled."""

    @property
    def smallest(self) -> float:
        """Positive value next to zero."""
        return 2.0 ** (self.smallest_exponent - self.mantissa_bits)


BFLOAT16 = FloatFormat(torch.bfloat16, torch.bfloat16, 7, -126, None)
FLOAT16 = FloatFormat(torch.float16, torch.float16, 10, -14, 15)
FLOAT8 = FloatFormat(torch.float8_e4m3fn, torch.uint8, 3, -6, 8)
FORMATS = {form.stored_as: form for form in (BFLOAT16, FLOAT16, FLOAT8)}
"""Types other than fp32 by the type that a configuration names; `torch.uint8` stands for fp8 (e4m3)."""


class Storage(ABC):
    """[n] values, read and written as fp32 in ranges `[start, end)`."""

    numel: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the values lie."""

    @abstractmethod
    def read(self, start: int, end: int) -> Tensor:
        """fp32 [end - start]; of `Float32Storage` the storage itself."""

    @abstractmethod
    def write(self, start: int, values: Tensor, step: int) -> None:
        """Store fp32 `values` from element `start` on; `step` chooses the random numbers."""

    def read_all(self) -> Tensor:
        """fp32 [n]."""
        return self.read(0, self.numel)


class Float32Storage(Storage):
    """Exact; updates may happen in place."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.numel = values.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def read(self, start: int, end: int) -> Tensor:
        return self.values[start:end]

    def write(self, start: int, values: Tensor, step: int) -> None:
        own = self.values[start : start + values.numel()]
        if own.data_ptr() != values.data_ptr():
            own.copy_(values)


class RoundedStorage(Storage):
    """Stochastically rounded to a 16- or 8-bit type, scaled by blocks where its exponents are few.

    Args:
        form: the type.
        numel: n.
        first: where in the flattened parameter the piece begins; blocks are those of the parameter.
        allocate: makes the tensors.
        salt: makes random numbers differ from those of the parameter's other values.
        second_moment: values are not negative, and one that is not zero stays so: its root is divided by. In fp8
            the grid of values is that of squares, since e4m3 spans only 2^17, and squares span twice as much.
    """

    def __init__(
        self,
        form: FloatFormat,
        numel: int,
        first: int,
        allocate: Allocate,
        *,
        salt: int = 0,
        second_moment: bool = False,
    ) -> None:
        self.form, self.numel, self.first, self.salt = form, numel, first, salt
        self.second_moment = second_moment
        self.of_squares = second_moment and form is FLOAT8
        self.values = allocate(numel, form.stored_as)
        self.exponents: Tensor | None = None
        if form.largest_scaled is not None:
            self.exponents = allocate(self._block(numel - 1) + 1, torch.int8)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def read(self, start: int, end: int) -> Tensor:
        values = self.values[start:end].view(self.form.dtype).float()
        if self.exponents is not None:
            values = self._times(values, start, self.exponents[self._blocks(start, end)])
        return values.square_() if self.of_squares else values

    def write(self, start: int, values: Tensor, step: int) -> None:
        end = start + values.numel()
        values = values.sqrt() if self.of_squares else values
        if self.exponents is not None:
            assert self.form.largest_scaled is not None
            exponents = block_exponents(_in_blocks(values, self._lead(start))) - self.form.largest_scaled
            exponents.clamp_(-126, 126)
            self.exponents[self._blocks(start, end)] = exponents.to(torch.int8)
            values = self._times(values, start, -exponents)
        noise = uniform_noise(self.first + start, end - start, step, self.salt, values.device)
        rounded = rounded_values(values, self.form, noise, second_moment=self.second_moment, squares=self.of_squares)
        self.values[start:end] = rounded.to(self.form.dtype).view(self.form.stored_as)

    def exponents_of(self, start: int, end: int) -> Tensor | None:
        """int8, of the blocks that elements [start, end) lie in; None where the type has exponents enough."""
        return None if self.exponents is None else self.exponents[self._blocks(start, end)]

    def _block(self, element: int) -> int:
        """Number of the block that an element lies in, counted from the first of the piece."""
        return (self.first + element) // BLOCK - self.first // BLOCK

    def _blocks(self, start: int, end: int) -> slice:
        return slice(self._block(start), self._block(end - 1) + 1)

    def _lead(self, start: int) -> int:
        """Elements of the first block that lie before `start`."""
        return (self.first + start) % BLOCK

    def _times(self, values: Tensor, start: int, exponents: Tensor) -> Tensor:
        """`values` times 2^exponent of their block."""
        lead = self._lead(start)
        scaled = _in_blocks(values, lead) * power_of_two(exponents).unsqueeze(1)
        return scaled.view(-1)[lead : lead + values.numel()]


class RemainderStorage(Storage):
    """fp32 main weights as bf16 weights, which the model has anyway, and the 16 bits that those lack.

    Exact: the model's weight is the nearest bf16 value (of two that are equally near, the one farther from zero), and
    the remainder is what it has been rounded by, in units of the last place of fp32.
    """

    def __init__(self, weights: Tensor, allocate: Allocate) -> None:
        if weights.dtype != torch.bfloat16:
            raise ValueError(f"remainders complete bfloat16 weights, these are {weights.dtype}")
        self.weights = weights
        self.numel = weights.numel()
        self.remainders = allocate(self.numel, torch.int16)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def read(self, start: int, end: int) -> Tensor:
        return joined(self.weights[start:end], self.remainders[start:end])

    def write(self, start: int, values: Tensor, step: int) -> None:
        end = start + values.numel()
        self.weights[start:end], self.remainders[start:end] = split(values)


def joined(weights: Tensor, remainders: Tensor) -> Tensor:
    """fp32 values of bf16 weights and what these lack, int16."""
    return (weights.float().view(torch.int32) + remainders).view(torch.float32)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and remainders that `joined` makes `values` of."""
    high = values.bfloat16().float().view(torch.int32)
    remainder = values.view(torch.int32) - high
    tie = remainder == 2**15  # half a bf16 unit, rounded towards zero: does not fit into 16 bits
    # The clamp concerns NaN alone, which stays one.
    remainder = torch.where(tie, -(2**15), remainder).clamp(-(2**15), 2**15 - 1).short()
    return torch.where(tie, high + 2**16, high).view(torch.float32).bfloat16(), remainder


def rounded_values(values: Tensor, form: FloatFormat, noise: Tensor, *, second_moment: bool, squares: bool) -> Tensor:
    """`round_stochastically`; a second moment that is not zero stays so."""
    rounded = round_stochastically(values, form, noise, squares=squares)
    return torch.where(values > 0, rounded.clamp(min=form.smallest), rounded) if second_moment else rounded


def round_stochastically(values: Tensor, form: FloatFormat, noise: Tensor, *, squares: bool = False) -> Tensor:
    """fp32 values that `form` represents, one of the two neighbours of each; the mean over `noise` is the value.

    Args:
        noise: fp32 in [0, 1), of the shape of `values`.
        squares: the mean of the squares is that of `values` instead.
    """
    size = values.abs()
    power = (size.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)  # largest power of two that is not above
    unit = power.clamp_(min=2.0**form.smallest_exponent).mul_(2.0**-form.mantissa_bits)
    below = (size / unit).floor_().mul_(unit)
    above = below + unit
    if squares:
        share = (size.square() - below.square()) / (above.square() - below.square())
    else:
        share = (size - below) / unit
    return torch.where(noise < share, above, below).copysign_(values)


def uniform_noise(first: int, count: int, step: int, salt: int, device: torch.device) -> Tensor:
    """fp32 [count] in [0, 1): a hash of (element `first + i` of the parameter, `step`, `salt`), alike on every device.

    The mixing function is "lowbias32" (C. Wellons, public domain).
    """
    return noise_at(torch.arange(first, first + count, device=device), noise_seed(step, salt))


def noise_seed(step: int, salt: int) -> int:
    """int32 that stands for the step and for what is rounded."""
    return _signed(step * 0x85EBCA77 + salt * 0xC2B2AE3D)


def noise_at(places: Tensor, seed: int | Tensor) -> Tensor:
    """`uniform_noise` of elements `places` of the parameter, int64."""
    x = places.to(torch.int32).mul_(_signed(0x9E3779B1)).add_(seed)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(factor))
    return (x & _LOW_24_BITS).float().mul_(2.0**-24)


def _signed(number: int) -> int:
    """The int32 with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _in_blocks(values: Tensor, lead: int) -> Tensor:
    """[blocks, BLOCK], zeros around the values."""
    return pad(values, (lead, -(lead + values.numel()) % BLOCK)).view(-1, BLOCK)


def block_exponents(blocks: Tensor) -> Tensor:
    """int32 [blocks]: the smallest e with |value| <= 2^e; for a block of zeros the smallest there is."""
    largest = blocks.abs().amax(dim=1)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [1/2, 1)
    return torch.where(largest > 0, exponent - (mantissa == 0.5).int(), -126)


def power_of_two(exponents: Tensor) -> Tensor:
    """fp32 2^e for e from -126 to 127, exact."""
    return ((exponents.int() + 127) << 23).view(torch.float32)
