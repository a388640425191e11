"""Momentum, orthogonalized, for matrices (Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; at scale Liu et
al., arXiv:2502.16982, section 2), Adam for everything else.

A step moves a matrix along U Vᵀ of its momentum U S Vᵀ, found by Newton-Schulz iterations. They need the whole matrix,
of which a rank may hold a part: cut by features over tensor parallel ranks, or a range of its elements (distributed
optimizer). Parts of the latter kind are gathered first; for the former each iteration adds up the products of the
rows. [..., r, c]: a matrix, or one for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.collectives import all_reduce
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import ParamGroup
from megatron.core.utils import get_pg_size

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x -> a x + b x³ + c x⁵, which takes singular values of 0 < x <= 1 to about 1 within few iterations."""

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: max(rows, columns) ** 0.5,
    "shape_scaling": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "unit_rms_norm": lambda rows, columns: (rows / columns) ** 0.5,
}
"""`muon_scale_mode` -> factor on the update of a whole matrix; "spectral" gives its elements an RMS of 1."""


def is_matrix(name: str, param: Parameter) -> bool:
    """Whether a parameter is a linear layer's inside the model: not of embeddings, output layer or convolutions."""
    is_table = getattr(param, "is_embedding_or_output_parameter", False) or "embedding" in name or "relative" in name
    shaped = param.ndim == 2 or (param.ndim == 3 and getattr(param, "tensor_model_parallel", False))
    return shaped and not is_table and "conv1d" not in name and min(param.shape[-2:]) > 1


@dataclass(frozen=True)
class MatrixPart:
    """Elements `[start, end)` of this rank's shard of a matrix."""

    shape: torch.Size
    """Of the shard."""
    start: int
    end: int
    cut: int | None
    """Dimension along which ranks of `group` hold parts, -2 or -1; None if each has the whole."""
    stacked: int
    """Matrices that lie behind each other along it, such as gate and up."""
    group: ProcessGroup | None

    @classmethod
    def of(cls, param: Parameter, start: int, numel: int, tp_group: ProcessGroup | None) -> MatrixPart:
        """Of a model's parameter, as its layer has marked it."""
        is_cut = getattr(param, "tensor_model_parallel", False)
        cut = param.partition_dim - param.ndim if is_cut else None  # type: ignore[attr-defined]
        stacked = param.partition_stride if is_cut else 1  # type: ignore[attr-defined]
        return cls(param.shape, start, start + numel, cut, stacked, tp_group if is_cut else None)


def orthogonalized(x: Tensor, steps: int, cut: int | None = None, group: ProcessGroup | None = None) -> Tensor:
    """About U Vᵀ of x = U S Vᵀ, [..., r, c] fp32.

    Communicates: all-reduces over `group`, whose ranks have parts of x along `cut`, of the square products of the other
    dimension, one for each iteration.
    """
    a, b, c = COEFFICIENTS
    # The product over the cut dimension, or over the larger one, is the small one.
    turned = cut == -1 if cut is not None else x.size(-2) < x.size(-1)
    x = x.mT if turned else x
    norm = _summed(x.square().sum((-2, -1), keepdim=True), group).sqrt()
    x = x / norm.clamp(min=1e-30)
    for _ in range(steps):
        gram = _summed(x.mT @ x, group)
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x.mT if turned else x


def _summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    if get_pg_size(group) > 1:
        all_reduce(x, group=group, what="parts of a matrix for Muon")
    return x


class Muon(torch.optim.AdamW):
    """Muon for those parameters that `take_matrices` names, AdamW for the others.

    Args:
        param_groups: of all; the rates of a group are those of both rules.
        config: `muon_*` and `adam_*`.
    """

    def __init__(self, param_groups: list[ParamGroup], config: OptimizerConfig) -> None:
        betas = (config.adam_beta1, config.adam_beta2)
        assert config.lr is not None
        rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        super().__init__(param_groups, betas=betas, eps=config.adam_eps, fused=True, **rates)
        self.config = config
        self.matrices: dict[Tensor, MatrixPart] = {}
        self.whole_of_parts: Callable[[dict[Tensor, Tensor]], Iterable[tuple[Tensor, Tensor]]] = dict.items
        """Of {parameter: its part of a flattened shard}, (parameter, flattened shard) one by one."""

    def take_matrices(self, matrices: dict[Tensor, MatrixPart]) -> None:
        """Parameters of the groups that are matrices, or parts of some."""
        self.matrices = matrices

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grads = {param: param.grad for param in self._own() if param.grad is not None}
        for param in grads:
            param.grad = None  # which AdamW passes over
        result = super().step(closure)
        rates = {
            param: (group["lr"], group["weight_decay"]) for group in self.param_groups for param in group["params"]
        }
        directions = {param: self._direction(param, grad) for param, grad in grads.items()}
        for param, whole in self.whole_of_parts(directions):
            lr, decay = rates[param]
            param.mul_(1 - lr * decay).sub_(self._update(self.matrices[param], whole).view_as(param), alpha=lr)
        for param, grad in grads.items():
            param.grad = grad
        return result

    def _own(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"] if param in self.matrices)

    def _direction(self, param: Tensor, grad: Tensor) -> Tensor:
        """The momentum after this gradient, with `muon_use_nesterov` that which the next one like it would give."""
        init_muon_state_of(self, param)
        state, momentum = self.state[param], self.config.muon_momentum
        state["step"] += 1
        state["momentum_buffer"].lerp_(grad, 1 - momentum)
        mean = state["momentum_buffer"]
        return (grad.lerp(mean, momentum) if self.config.muon_use_nesterov else mean).reshape(-1)

    def _update(self, part: MatrixPart, whole: Tensor) -> Tensor:
        """Of the elements of `part`, flattened, from the direction of the shard."""
        matrix, config = whole.view(part.shape), self.config
        split = -2 if part.cut is None else part.cut
        pieces = [
            orthogonalized(piece, config.muon_num_ns_steps, part.cut, part.group)
            for piece in matrix.chunk(part.stacked, split)
        ]
        sizes = list(pieces[0].shape[-2:])
        sizes[split] *= get_pg_size(part.group)
        scale = config.muon_extra_scale_factor * SCALES[config.muon_scale_mode](*sizes)
        return torch.cat(pieces, split).reshape(-1)[part.start : part.end] * scale


def init_muon_state_of(optimizer: Muon, param: Tensor) -> None:
    """Zero momentum of a matrix that has none."""
    if not optimizer.state[param]:
        optimizer.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
