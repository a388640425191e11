"""Parameter values that depend on the seed, the parameter's global name and the position in the full tensor, and on
nothing else: not on the layout, the rank or the device.

A layer registers how its parameter is to be filled. Inside `deferred_initialization` it then waits until the
whole model exists and `initialize_parameters` can tell it its global name; outside it is filled at once,
every rank drawing the same full tensor from the default CPU generator.

Full tensors are drawn on the CPU in fp32. Elementwise initialisers (`blockwise = True`) are drawn block of
rows by block of rows, each from a generator of its own, so that a rank draws no more than the blocks it holds
a part of, and of the last block only its beginning where the initialiser allows it (`sequential = True`). Other
initialisers see the whole tensor; where its size depends on the layout (a vocabulary padded to a multiple of
the tensor parallel size), so may their values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.utils import get_pg_rank, get_pg_size

BLOCK_ELEMENTS = 1 << 20
"""Rows are drawn in blocks of about this many elements; part of the definition of the initial weights."""

UNIT = 16
"""Values of a `sequential` initialiser do not depend on how many are drawn behind them, but for the last so many."""


@dataclass(frozen=True)
class ParameterInit:
    """How a local shard is cut out of the full tensor, and how that is filled."""

    init_method: Callable[[Tensor], object]
    partition_dim: int
    """Dimension cut over the tensor parallel group, -1 for none."""
    size: int
    rank: int
    stride: int
    """Number of tensors stacked along `partition_dim`, each of which is cut on its own (2 for gate and up)."""
    enabled: bool = True
    stacked: tuple[str, ...] = ()
    """The parameter is a stack of tensors, each filled under its name; the other fields speak of one of them."""
    parts: tuple[int, ...] = ()
    """Lengths along `partition_dim` of tensors stacked there, each of which is cut on its own; `stride` is for equal
    ones."""

    def full_shape(self, local: torch.Size) -> list[int]:
        """Shape of the tensor whose shard is `local`."""
        shape = list(local)
        if self.partition_dim >= 0:
            shape[self.partition_dim] *= self.size
        return shape

    def local_ranges(self, local: torch.Size) -> list[tuple[int, int, int]]:
        """(start in the full dim, start in the local dim, length) of each stacked part, along `partition_dim`."""
        length = local[self.partition_dim]
        shares = [part // self.size for part in self.parts] or [length // self.stride] * self.stride
        before = [sum(shares[:i]) for i in range(len(shares))]
        return [(start * self.size + self.rank * n, start, n) for start, n in zip(before, shares)]


_deferred: bool = False
_seed: int | None = None


def set_initialization_seed(seed: int | None) -> None:
    """The seed from which named parameters derive; None goes back to the seed of the default CPU generator."""
    global _seed
    _seed = seed


@contextmanager
def deferred_initialization() -> Iterator[None]:
    """Parameters registered inside wait for `initialize_parameters`. May be nested."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def register_parameter_init(
    param: nn.Parameter,
    init_method: Callable[[Tensor], object],
    *,
    partition_dim: int = -1,
    tp_group: ProcessGroup | None = None,
    stride: int = 1,
    perform_initialization: bool = True,
    stacked: tuple[str, ...] = (),
    parts: tuple[int, ...] = (),
) -> None:
    """Note how `param`, this rank's shard, is filled; fill it now unless initialisation is deferred.

    Args:
        init_method: fills a full fp32 tensor in place.
        partition_dim: dimension cut over `tp_group`, -1 if every rank holds the whole.
        stride: number of tensors stacked along `partition_dim`, each cut on its own.
        perform_initialization: False leaves the values as they are (a checkpoint will fill them).
        stacked: names of the tensors that `param` stacks along a first dimension, in place of the last part of its
            own name. `partition_dim` and `stride` speak of one of them.
        parts: lengths along `partition_dim` of tensors stacked there, each cut on its own; for those that are not equal
            in length.
    """
    spec = ParameterInit(
        init_method,
        partition_dim,
        get_pg_size(tp_group),
        get_pg_rank(tp_group),
        stride,
        perform_initialization,
        stacked,
        parts,
    )
    _register(param, spec)


def cut_in_parts(param: nn.Parameter, parts: tuple[int, ...]) -> None:
    """Say of a registered parameter, cut over ranks as one tensor, that it stacks tensors of these lengths."""
    _register(param, replace(param.init_spec, parts=parts))  # type: ignore[attr-defined]


def _register(param: nn.Parameter, spec: ParameterInit) -> None:
    param.init_spec = spec  # type: ignore[attr-defined]
    if not _deferred and spec.enabled and not param.is_meta:
        for member in param.unbind() if spec.stacked else (param,):
            _copy_shard(member, _draw(spec, spec.full_shape(member.shape), None), spec)


def initialize_parameters(
    module: nn.Module, global_name: Callable[[str], str] = lambda name: name, seed: int | None = None
) -> None:
    """Fill every registered parameter of `module` from (seed, global name, position).

    Does nothing inside an outer `deferred_initialization`. Parameters that appear twice are filled once.

    Args:
        global_name: maps a local parameter name to that of the whole model (layer numbers of a pipeline
            stage).
    """
    if _deferred:
        return
    for name, param in module.named_parameters():
        spec = getattr(param, "init_spec", None)
        if spec is not None and spec.enabled and not param.is_meta:
            _fill(param, spec, _resolved(seed), global_name(name))


def _resolved(seed: int | None) -> int:
    return seed if seed is not None else _seed if _seed is not None else torch.initial_seed()


def parameter_device(config: ModelParallelConfig) -> torch.device:
    """Where layers allocate their parameters: nowhere (the meta device) if others are to do it later."""
    is_later = getattr(config, "init_model_with_meta_device", False)
    return torch.device("meta") if is_later else device.current_device()


def materialize_parameters(module: nn.Module, global_name: Callable[[str], str] = lambda name: name) -> None:
    """Give parameters that are on the meta device memory, and the values that they would have had from the start.

    They stay the same objects. Arguments as of `initialize_parameters`.

    Raises:
        ValueError: nobody has registered how a parameter is filled.
    """
    for name, param in module.named_parameters():
        if param.is_meta:
            require_init_spec(name, param)
            real = nn.Parameter(torch.zeros_like(param, device=device.current_device()), param.requires_grad)
            real.__dict__.update(param.__dict__)
            torch.utils.swap_tensors(param, real)
    initialize_parameters(module, global_name)


def require_init_spec(name: str, param: Tensor) -> None:
    """Raise for a parameter whose values only its own constructor knows."""
    if not hasattr(param, "init_spec"):
        raise ValueError(
            f"{name} cannot be built on the meta device (init_model_with_meta_device): its initial values are not "
            "registered by register_parameter_init"
        )


def initial_value(
    shape: torch.Size, dtype: torch.dtype, spec: ParameterInit, name: str, seed: int | None = None
) -> Tensor:
    """What a parameter of global name `name` starts with, [this rank's tensor parallel shard] on the CPU.

    Zero where its initialisation is switched off.
    """
    value = torch.zeros(shape, dtype=dtype)
    if spec.enabled:
        _fill(value, spec, _resolved(seed), name)
    return value


@torch.no_grad()
def _fill(param: Tensor, spec: ParameterInit, seed: int, name: str) -> None:
    if spec.stacked:
        prefix = name.rpartition(".")[0]
        for member, member_name in zip(param.unbind(), spec.stacked):
            _fill(member, replace(spec, stacked=()), seed, f"{prefix}.{member_name}")
        return
    shape = spec.full_shape(param.shape)
    if not getattr(spec.init_method, "blockwise", False):
        _copy_shard(param, _draw(spec, shape, _derived_seed(seed, name, 0)), spec)
        return
    row_elements = max(1, torch.Size(shape[1:]).numel())
    block_rows = max(1, BLOCK_ELEMENTS // row_elements)
    rows = shape[0] if shape else 1
    for block, start in enumerate(range(0, rows, block_rows)):
        stop = min(start + block_rows, rows)
        if not _overlaps(param, spec, start, stop):
            continue
        # As if the whole block were drawn even where the tensor ends inside it: a vocabulary padded to another
        # size has the same first rows.
        needed = (stop - start) * row_elements
        values = _draw_first(needed, block_rows * row_elements, spec, _derived_seed(seed, name, block))
        _copy_rows(param, values.view([stop - start, *shape[1:]]) if shape else values, spec, start)


def _derived_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch seeds are signed 64 bit


def _draw_first(needed: int, whole: int, spec: ParameterInit, seed: int) -> Tensor:
    """The first `needed` of the `whole` values of a block, without most of the others where that is the same."""
    enough = -(-needed // UNIT) * UNIT
    is_same = getattr(spec.init_method, "sequential", False) and enough <= whole - UNIT
    return _draw(spec, [enough if is_same else whole], seed)[:needed]


def _draw(spec: ParameterInit, shape: list[int], seed: int | None) -> Tensor:
    full = torch.empty(shape, dtype=torch.float32, device="cpu")
    if seed is None:
        spec.init_method(full)
        return full
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        spec.init_method(full)
    return full


@torch.no_grad()
def _copy_shard(param: Tensor, full: Tensor, spec: ParameterInit) -> None:
    if spec.partition_dim < 0 or spec.size == 1:
        param.copy_(full)
        return
    for source, target, length in spec.local_ranges(param.shape):
        part = full.narrow(spec.partition_dim, source, length)
        param.narrow(spec.partition_dim, target, length).copy_(part)


def _overlaps(param: Tensor, spec: ParameterInit, start: int, stop: int) -> bool:
    if spec.partition_dim != 0:
        return True
    return any(s < stop and start < s + length for s, _, length in spec.local_ranges(param.shape))


def _copy_rows(param: Tensor, rows: Tensor, spec: ParameterInit, start: int) -> None:
    """Copy what this rank holds of full rows `[start, start + len(rows))`."""
    if spec.partition_dim == 0:
        for source, target, length in spec.local_ranges(param.shape):
            first, last = max(source, start), min(source + length, start + len(rows))
            if first < last:
                part = rows[first - start : last - start]
                param.narrow(0, target + first - source, last - first).copy_(part)
    elif spec.partition_dim > 0:
        for source, target, length in spec.local_ranges(param.shape):
            part = rows.narrow(spec.partition_dim, source, length)
            param[start : start + len(rows)].narrow(spec.partition_dim, target, length).copy_(part)
    elif param.dim():
        param[start : start + len(rows)].copy_(rows)
    else:
        param.copy_(rows[0])
