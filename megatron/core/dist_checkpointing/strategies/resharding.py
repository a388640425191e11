"""From where in a checkpoint a local shard is read, for any two layouts.

A checkpoint holds a tensor in one of two shapes:

- plain: the global shape, cut into boxes;
- flattened: the global tensor was cut into a grid of equal cells and each cell was flattened, so that ranges
  of it could go to different data parallel ranks (sharded optimizer state). It is stored with shape grid +
  (cell elements,).

A local shard is a box of the global tensor or a range of a flattened box. A range of a row-major box is a
union of few boxes, and what a box shares with a cell is a box again: so each of the four cases is a set of copies from
one strided view to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from operator import add, sub

import torch

from ..core import CheckpointingException
from ..mapping import ShardedTensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorReformulationMetadata:
    """Two shapes of one tensor: of the global tensor, and of what the checkpoint holds."""

    ckpt_orig_global_shape: Shape
    ckpt_reform_global_shape: Shape


@dataclass(frozen=True)
class Box:
    """Axis-aligned box of elements."""

    offsets: Shape
    sizes: Shape

    def intersection(self, other: Box) -> Box | None:
        """What two boxes share; None if nothing."""
        starts = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(map(sub, map(min, self.stops, other.stops), starts))
        return None if min(sizes, default=1) <= 0 else Box(starts, sizes)

    @cached_property
    def stops(self) -> Shape:
        """First coordinate after the box, on every axis."""
        return tuple(map(add, self.offsets, self.sizes))

    def moved(self, by: Shape, sign: int = 1) -> Box:
        """The box translated by `sign * by`."""
        return Box(tuple(map(add if sign > 0 else sub, self.offsets, by)), self.sizes)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)


@dataclass
class ReadTarget:
    """Where to put the part `box` of the stored tensor `key`. `box` is in the coordinates of the stored
    shape."""

    key: str
    box: Box
    tensor: torch.Tensor


@dataclass
class CellTarget:
    """Where to put the part `box` of a cell of the stored tensor `key`, which is stored flattened. `box` is in the
    coordinates of the cell, of shape `cell`."""

    key: str
    position: Shape
    cell: Shape
    box: Box
    tensor: torch.Tensor


@dataclass
class LocalRead:
    """All that has to happen to fill one local shard."""

    targets: list[ReadTarget | CellTarget] = field(default_factory=list)
    zero_first: torch.Tensor | None = None


def boxes_of_range(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Disjoint boxes, in order, that make up elements `start` to `stop` of a row-major tensor of `shape`.

    >>> [(b.offsets, b.sizes) for b in boxes_of_range((3, 4), 2, 9)]
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if start == 0 and stop == prod(shape):
        yield Box((0,) * len(shape), tuple(shape))
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # begins and ends inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if stop > last * row:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((index, *box.offsets), (1, *box.sizes))


def row_major_strides(shape: Shape) -> Shape:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def flat_index(position: Shape, shape: Shape) -> int:
    """Index of a position in the flattened tensor of `shape`."""
    return sum(p * s for p, s in zip(position, row_major_strides(shape)))


def plan_local_read(tensor: ShardedTensor, stored_shape: Shape, original_shape: Shape | None) -> LocalRead:
    """What to read to fill `tensor.data`.

    Args:
        tensor: the local shard, with data.
        stored_shape: shape in the checkpoint.
        original_shape: global shape if the checkpoint holds the tensor flattened, else None.

    Raises:
        CheckpointingException: the checkpoint's global shape is another one.
    """
    assert tensor.data is not None
    global_shape = tuple(stored_shape if original_shape is None else original_shape)
    check_same_shape(tensor, global_shape)
    plan = LocalRead()
    if global_shape != tuple(tensor.global_shape):
        plan.zero_first = tensor.data
    if original_shape is not None and _add_aligned_range(plan, tensor, tuple(stored_shape), global_shape):
        return plan
    whole = Box((0,) * len(global_shape), global_shape)
    for box, destination in _local_boxes(tensor):
        present = box.intersection(whole)
        if present is None:
            continue
        part = narrow(destination, present.moved(box.offsets, -1))
        if original_shape is None:
            plan.targets.append(ReadTarget(tensor.key, present, part))
        else:
            _add_cells(plan, tensor, present, part, tuple(stored_shape), global_shape)
    return plan


def check_same_shape(tensor: ShardedTensor, global_shape: Shape) -> None:
    """Raise unless the checkpoint's global shape suits; a padded tensor may differ along its first own
    axis."""
    expected = tuple(tensor.global_shape)
    padded = tensor.prepend_axis_num if tensor.allow_shape_mismatch else None
    same = len(expected) == len(global_shape) and all(
        want == have or axis == padded for axis, (want, have) in enumerate(zip(expected, global_shape))
    )
    if not same:
        raise CheckpointingException(
            f"{tensor.key}: shape {list(global_shape)} in the checkpoint, {list(expected)} expected"
        )


def _local_boxes(tensor: ShardedTensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """(box in the global tensor, view of the data with the same number of axes) that make up the local
    shard."""
    data, prepended = tensor.data, tensor.prepend_axis_num
    assert data is not None
    if tensor.flattened_range is None:
        box = Box(tuple(tensor.global_offset), tensor.shape_in_global)
        if box.numel:
            yield (
                box,
                data.reshape(tensor.shape_in_global) if data.is_contiguous() else _expand(data, prepended),
            )
        return
    if not data.is_contiguous():
        raise CheckpointingException(f"{tensor.key}: flattened data must be contiguous")
    shape = tensor.shape_in_global
    start, strides = tensor.flattened_range.start, row_major_strides(shape)
    for box in boxes_of_range(shape, start, tensor.flattened_range.stop):
        first = flat_index(box.offsets, shape) - start
        yield (
            box.moved(tuple(tensor.global_offset)),
            data.as_strided(box.sizes, strides, data.storage_offset() + first),
        )


def _expand(data: torch.Tensor, prepended: int) -> torch.Tensor:
    for _ in range(prepended):
        data = data.unsqueeze(0)
    return data


def narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of `tensor` that `box` describes, as a view."""
    whole = tensor.shape
    for axis, (start, size) in enumerate(zip(box.offsets, box.sizes)):
        if start or size != whole[axis]:
            tensor = tensor.narrow(axis, start, size)
    return tensor


def _cell_shape(stored_shape: Shape, global_shape: Shape) -> Shape:
    return tuple(total // count for total, count in zip(global_shape, stored_shape[:-1], strict=True))


def _add_aligned_range(plan: LocalRead, tensor: ShardedTensor, stored_shape: Shape, global_shape: Shape) -> bool:
    """Read straight from one cell if the local box is a cell of the checkpoint's grid."""
    cell = _cell_shape(stored_shape, global_shape)
    if cell != tensor.shape_in_global or any(off % size for off, size in zip(tensor.global_offset, cell) if size):
        return False
    position = tuple(off // size if size else 0 for off, size in zip(tensor.global_offset, cell))
    inside = all(p < count for p, count in zip(position, stored_shape))
    assert tensor.data is not None
    if tensor.flattened_range is None and not tensor.data.is_contiguous():
        return False
    wanted = tensor.flattened_range or slice(0, prod(cell))
    if inside and wanted.start < wanted.stop:
        length = wanted.stop - wanted.start
        box = Box((*position, wanted.start), (1,) * len(position) + (length,))
        plan.targets.append(ReadTarget(tensor.key, box, tensor.data.view(box.sizes)))
    return True


def _add_cells(
    plan: LocalRead,
    tensor: ShardedTensor,
    box: Box,
    destination: torch.Tensor,
    stored_shape: Shape,
    global_shape: Shape,
) -> None:
    """Read `box` of the global tensor from the cells that it touches."""
    cell = _cell_shape(stored_shape, global_shape)
    grid = [range(off // size, -(-stop // size)) for off, stop, size in zip(box.offsets, box.stops, cell)]
    for position in product(*grid):
        corner = tuple(p * size for p, size in zip(position, cell))
        shared = box.intersection(Box(corner, cell))
        assert shared is not None
        part = narrow(destination, shared.moved(box.offsets, -1))
        plan.targets.append(CellTarget(tensor.key, position, cell, shared.moved(corner, -1), part))
