"""Parameters of a mixer: cut over the tensor parallel ranks, some in several parts that are each cut on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide, get_pg_size


def sharded_parameter(
    shape: tuple[int, ...],
    config: TransformerConfig,
    init_method: Callable[[Tensor], object],
    tp_group: ProcessGroup | None,
    *,
    parts: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """This rank's rows of a parameter of `shape`.

    Args:
        parts: rows of the tensors that it stacks, each of which is cut on its own.
    """
    local = (divide(shape[0], get_pg_size(tp_group)), *shape[1:])
    param = nn.Parameter(torch.empty(local, dtype=dtype or config.params_dtype, device=parameter_device(config)))
    set_tensor_model_parallel_attributes(param, True, 0, 1)
    register_parameter_init(
        param,
        init_method,
        partition_dim=0,
        tp_group=tp_group,
        parts=tuple(parts),
        perform_initialization=config.perform_initialization,
    )
    return param


def split_factory(
    whole: ShardedTensor, sections: Sequence[int], names: Sequence[str], dim: int
) -> ShardedTensorFactory:
    """The parts that a shard stacks, each under a key of its own: `<key>.<name>`.

    A flattened range of the shard (distributed optimizer) becomes the ranges of the parts that it covers.

    Args:
        sections: lengths of this rank's parts.
        dim: dimension along which they lie, the one that is cut over the ranks.

    Raises:
        ValueError: the sections do not add up to the shard.
    """
    if sum(sections) != whole.local_shape[dim]:
        raise ValueError(
            f"{whole.key}: parts of {list(sections)} make {sum(sections)}, dimension {dim} of the shard has "
            f"{whole.local_shape[dim]}"
        )

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        described = replace(whole, data=data, dtype=data.dtype, replica_id=replica_id, flattened_range=flattened_range)
        parts, start = [], 0
        for name, length in zip(names, sections):
            parts += [replace(part, key=f"{key}.{name}") for part in described.narrow(dim, start, length)]
            start += length
        return parts

    def merge(parts: Any) -> Tensor:
        return torch.cat(parts, dim=dim if parts[0].dim() > dim else 0)

    return ShardedTensorFactory(
        whole.key,
        whole.data,
        build,  # type: ignore[arg-type]
        merge,
        whole.replica_id,
        flattened_range=whole.flattened_range,
    )
