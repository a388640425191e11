"""Weights of linear layers in 8 or 4 bits, for models that are only run forward.

n rows (outputs), k columns (inputs), both of this rank's shard; m rows of inputs.

| kind | stored | value |
|---|---|---|
| int8 | a byte, one scale a row | q s, s = largest magnitude / 127 |
| fp8 | a byte (e4m3, arXiv:2209.05433), one scale a row | q s, s = largest magnitude / 448 |
| int4 | half a byte, a bf16 scale for `GROUP` columns | (q - 8) s, s = their largest value (by magnitude) / -8 |

A scale of a row is that of the whole row, also where ranks share it. So each layout stores the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives
from megatron.core.tensor_parallel.stored_weight import StoredWeight
from megatron.core.utils import get_pg_size

GROUP = 32
BLOCK_BYTES = 1 << 20
"""About so much of a weight is widened at a time on a CPU: within its cache."""
FEW_ROWS = 4
"""So many inputs at most go to torch's product of bf16 and int8, which reads a weight once for each of them."""
FP8 = torch.float8_e4m3fn


class QuantizedWeight(StoredWeight):
    """Takes the place of a weight [n, k]; `multiply` gives x Wᵀ in the type of x.

    Args:
        weight: [n, k], any float type.
        kind: a key of `KINDS`.
        group: ranks that have other columns of the same rows; None if rows are whole.

    Raises:
        ValueError: the kind is unknown, or k is no multiple of `GROUP` for int4.
    """

    stored: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, kind: str, group: ProcessGroup | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"quantization {kind!r}: there are {', '.join(KINDS)}")
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        stored, scale = KINDS[kind](weight.detach().float(), group)
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return self.stored.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """[n, k], in the type of the weight unless told otherwise."""
        scale = 1.0 if self.kind == "int4" else self.scale.float()[:, None]
        return (self._widened(slice(None), torch.float32) * scale).to(dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product = self._product(x)
        return product if bias is None else product + bias

    def _product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        if self.kind == "int8" and len(rows) <= FEW_ROWS and x.dtype is torch.bfloat16 and x.device.type == "cpu":
            product = torch._weight_int8pack_mm(rows.contiguous(), self.stored, self.scale.to(x.dtype))
            return product.view(*x.shape[:-1], self.shape[0])
        product = x.new_empty(len(rows), self.shape[0])
        for block in self._blocks(x):
            torch.mm(rows, self._widened(block, x.dtype).t(), out=product[:, block])
        if self.kind != "int4":
            product = (product * self.scale).to(x.dtype)
        return product.view(*x.shape[:-1], self.shape[0])

    def _blocks(self, x: Tensor) -> Iterator[slice]:
        size = self.shape[0]
        if x.device.type == "cpu":
            size = max(1, BLOCK_BYTES // (self.shape[1] * x.element_size()))
        for start in range(0, self.shape[0], size):
            yield slice(start, start + size)

    def _widened(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of it, [b, k], without the scales that belong to whole rows."""
        stored = self.stored[rows]
        if self.kind == "int8":
            return stored.to(dtype)
        if self.kind == "fp8":
            return _fp8_to_half(stored).to(dtype)
        half = stored.size(1)
        values = torch.empty(len(stored), 2 * half, dtype=dtype, device=stored.device)
        values[:, :half], values[:, half:] = stored & 15, stored >> 4
        groups = values.view(len(stored), -1, GROUP)
        groups.sub_(8).mul_(self.scale[rows].to(dtype).unsqueeze(-1))
        return values

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.shape)}"


def _fp8_to_half(values: Tensor) -> Tensor:
    """2^-8 times the values, in fp16: the same bits in other places. Many times as fast as torch's own on a CPU."""
    return values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)


def _row_scale(weight: Tensor, most: float, group: ProcessGroup | None) -> Tensor:
    """[n]: what makes `most` of the largest magnitude of each row. Communicates: an all-reduce over the group."""
    largest = weight.abs().amax(1)
    if group is not None and get_pg_size(group) > 1:
        collectives.all_reduce(largest, dist.ReduceOp.MAX, group, "magnitudes of weights")
    return largest.div_(most).clamp_(min=torch.finfo(torch.float32).tiny)


def _to_int8(weight: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    scale = _row_scale(weight, 127.0, group)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def _to_fp8(weight: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    scale = _row_scale(weight, torch.finfo(FP8).max, group)
    return (weight / scale[:, None]).to(FP8), scale * 256  # see `_fp8_to_half`


def _to_int4(weight: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    if weight.size(1) % GROUP:
        raise ValueError(f"int4 needs input sizes that are multiples of {GROUP} on each rank, got {weight.size(1)}")
    groups = weight.unflatten(1, (-1, GROUP))
    place = groups.abs().argmax(-1, keepdim=True)
    scale = (groups.gather(-1, place)[..., 0] / -8).to(torch.bfloat16)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    values = (groups / divisor[..., None]).round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)
    low, high = values.chunk(2, dim=1)  # of columns: each half is unpacked in one piece
    return low | high << 4, scale


KINDS: dict[str, Callable[[Tensor, ProcessGroup | None], tuple[Tensor, Tensor]]] = {
    "int8": _to_int8,
    "int4": _to_int4,
    "fp8": _to_fp8,
}
