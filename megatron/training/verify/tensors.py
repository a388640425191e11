"""Whole tensors of a model that is spread over ranks, put together without the help of the checkpoint code.

Each rank says for each of its parameters where it stands in the whole tensor, from the attributes that tensor parallel
layers set and from the parameter's global name. What several ranks hold must be the same on all of them, to the bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

Array = numpy.ndarray


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + len(values))` of one rank's flattened shard of a tensor."""

    name: str
    """The parameter's name in the whole model."""
    values: Array
    start: int
    shape: tuple[int, ...]
    """Of the shard."""
    dim: int
    """Along which the tensor is cut over the tensor parallel ranks, -1 for not at all."""
    stride: int
    """Tensors stacked along `dim`, each cut on its own."""
    tp_rank: int
    tp_size: int
    parts: tuple[int, ...] = ()
    """Lengths in the whole tensor of those stacked along `dim`, where they differ."""


@dataclass
class WholeTensors:
    """Tensors by global name, and how well the ranks that share some agreed."""

    tensors: dict[str, Array]
    disagreement: tuple[float, str]
    """Largest absolute difference between two copies of an element, and in which tensor."""
    missing: list[str]
    """Tensors of which no rank held some element."""


def named_parameters(model: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the whole model, parameter) of this rank's chunks."""
    for chunk in model:
        bare = unwrap_model(chunk)
        for name, param in bare.named_parameters():
            yield bare.global_parameter_name(name), param


def pieces_of(
    model: Iterable[nn.Module], value: Callable[[nn.Parameter], list[tuple[int, Tensor]] | None]
) -> list[Piece]:
    """This rank's pieces of `value` of every parameter: a list of (first element, flat values)."""
    pieces: list[Piece] = []
    for name, param in named_parameters(model):
        of_experts = ".experts." in name
        whole = Piece(
            name,
            numpy.empty(0),
            0,
            tuple(param.shape),
            param.partition_dim if getattr(param, "tensor_model_parallel", False) else -1,  # type: ignore[attr-defined]
            getattr(param, "partition_stride", 1),
            *(_place_of_expert() if of_experts else _place()),
            parts=getattr(getattr(param, "init_spec", None), "parts", ()),
        )
        for start, values in value(param) or []:
            piece = replace(whole, values=_array(values), start=start)
            stacked = getattr(getattr(param, "init_spec", None), "stacked", ())
            pieces += _members(piece, stacked) if stacked else [piece]
    return pieces


def _place() -> tuple[int, int]:
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _place_of_expert() -> tuple[int, int]:
    return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()


def _array(values: Tensor) -> Array:
    values = values.detach().cpu()
    return numpy.ascontiguousarray((values.double() if values.dtype == torch.bfloat16 else values).numpy())


def _members(piece: Piece, names: tuple[str, ...]) -> list[Piece]:
    """The parts of a piece of several stacked tensors, under the names of these."""
    shape, size, end = piece.shape[1:], int(numpy.prod(piece.shape[1:])), piece.start + len(piece.values)
    prefix = piece.name.rpartition(".")[0]
    members = []
    for i, name in enumerate(names):
        first, last = max(piece.start, i * size), min(end, (i + 1) * size)
        if first < last:
            values, start = piece.values[first - piece.start : last - piece.start], first - i * size
            member = replace(piece, name=f"{prefix}.{name}", values=values, start=start, shape=shape, dim=piece.dim - 1)
            members.append(member)
    return members


def weights(param: nn.Parameter) -> list[tuple[int, Tensor]]:
    """A parameter's own values."""
    return [(0, _whole(param.data).reshape(-1).clone())]


def gradients(optimizer: Any) -> Callable[[nn.Parameter], list[tuple[int, Tensor]] | None]:
    """What gives a parameter's finished gradient: all of it, or the parts that this rank's optimizer owns."""
    owned: dict[nn.Parameter, list[tuple[int, Tensor]]] = defaultdict(list)
    is_sharded = False
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for shard in getattr(part, "shards", ()):
            is_sharded = True
            owned[shard.param].append((shard.start, shard.grad_piece.reshape(-1).clone()))

    def gradient(param: nn.Parameter) -> list[tuple[int, Tensor]] | None:
        if is_sharded:
            return owned.get(param)
        grad = param.main_grad if hasattr(param, "main_grad") else param.grad
        return None if grad is None else [(0, _whole(grad).reshape(-1).clone())]

    return gradient


def _whole(tensor: Any) -> Tensor:
    """A tensor of which torch keeps a shard on each rank, whole. Communicates: all-gather."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(pieces: list[Piece]) -> list[Piece] | None:
    """The pieces of all ranks on rank 0, None elsewhere. Communicates: gather."""
    first = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(pieces, everyone)
    return [piece for part in everyone for piece in part] if everyone is not None else None


def assemble(pieces: Iterable[Piece]) -> WholeTensors:
    """Whole tensors out of the pieces of all ranks."""
    shards: dict[str, dict[int, tuple[Piece, Array]]] = defaultdict(dict)
    worst = (0.0, "")
    for piece in pieces:
        place = piece.tp_rank if piece.dim >= 0 else 0
        if place not in shards[piece.name]:
            empty = numpy.full(int(numpy.prod(piece.shape)), numpy.nan, piece.values.dtype)
            shards[piece.name][place] = (piece, empty)
        flat = shards[piece.name][place][1][piece.start : piece.start + piece.values.size]
        known = ~numpy.isnan(flat)
        if known.any():
            difference = float(numpy.abs(flat[known] - piece.values[known]).max())
            worst = max(worst, (difference, piece.name)) if difference == difference else (numpy.inf, piece.name)
        flat[~known] = piece.values[~known]
    tensors = {name: _join(parts) for name, parts in shards.items()}
    return WholeTensors(tensors, worst, [name for name, t in tensors.items() if numpy.isnan(t).any()])


def _join(parts: dict[int, tuple[Piece, Array]]) -> Array:
    """The shards of the tensor parallel ranks as one tensor."""
    piece = next(iter(parts.values()))[0]
    if piece.dim < 0:
        return parts[0][1].reshape(piece.shape)
    nothing = numpy.full(piece.shape, numpy.nan, piece.values.dtype)
    local = [parts[i][1].reshape(parts[i][0].shape) if i in parts else nothing for i in range(piece.tp_size)]
    shares = [part // piece.tp_size for part in piece.parts]
    borders = numpy.cumsum(shares)[:-1] if shares else piece.stride
    stacked = [numpy.split(shard, borders, axis=piece.dim) for shard in local]
    return numpy.concatenate([part for parts in zip(*stacked) for part in parts], axis=piece.dim)
