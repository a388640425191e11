"""Linear layers and the word embedding, cut over the tensor parallel group (Shoeybi et al., arXiv:1909.08053,
section 3; with sequence parallelism Korthikanti et al., arXiv:2205.05198, section 4.2.2).

s sequence, b microbatch; `in`, `out` are the sizes of the full matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.gemm import PLAIN_PRODUCTS, LinearProducts
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.tensor_parallel.linear import (
    LinearWithFrozenWeight,
    LinearWithGradAccumulationAndAsyncCommunication,
    embedding_lookup,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.overlap import ColumnParallelOverlap, OverlapPlan, RowParallelOverlap, overlap_plan
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.tensor_parallel.weight_grad_queue import WeightGradQueue
from megatron.core.utils import (
    divide,
    get_pg_rank,
    get_pg_size,
    get_tensor_model_parallel_group_if_none,
    make_replicated_sharded_object,
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

__all__ = [
    "ColumnParallelLinear",
    "LinearWithFrozenWeight",
    "LinearWithGradAccumulationAndAsyncCommunication",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_tensor_model_parallel_attributes",
    "linear_with_frozen_weight",
    "linear_with_grad_accumulation_and_async_allreduce",
    "param_is_not_tensor_parallel_duplicate",
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "set_tensor_model_parallel_attributes",
]

_TP_ATTRIBUTE_DEFAULTS: dict[str, Any] = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
}

Offsets = tuple[tuple[int, int, int], ...]


def param_is_not_tensor_parallel_duplicate(param: Tensor, tp_group: ProcessGroup | None = None) -> bool:
    """Whether this rank is the one that counts `param` in norms: it is sharded, or this is the first rank."""
    if getattr(param, "tensor_model_parallel", False):
        return True
    return get_pg_rank(get_tensor_model_parallel_group_if_none(tp_group)) == 0


def set_tensor_model_parallel_attributes(tensor: Tensor, is_parallel: bool, dim: int, stride: int) -> None:
    """Mark a parameter as cut along `dim`."""
    for name, value in zip(_TP_ATTRIBUTE_DEFAULTS, (is_parallel, dim, stride)):
        setattr(tensor, name, value)


def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor: Tensor) -> None:
    """Mark a parameter as whole unless it is marked already."""
    for name, value in _TP_ATTRIBUTE_DEFAULTS.items():
        if not hasattr(tensor, name):
            setattr(tensor, name, value)


def copy_tensor_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Mark `destination_tensor` as `source_tensor` is."""
    for name in _TP_ATTRIBUTE_DEFAULTS:
        if hasattr(source_tensor, name):
            setattr(destination_tensor, name, getattr(source_tensor, name))


def _sharded_parameter(
    shape: tuple[int, ...],
    config: ModelParallelConfig,
    init_method: Callable[[Tensor], object],
    *,
    partition_dim: int,
    group: ProcessGroup | None,
    stride: int = 1,
    is_expert: bool = False,
) -> nn.Parameter:
    """This rank's shard; `partition_dim` -1 for a parameter that all ranks hold whole."""
    param = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=parameter_device(config)))
    set_tensor_model_parallel_attributes(param, partition_dim >= 0, partition_dim, stride)
    param.allreduce = not (is_expert and config.experts_have_own_replicas)  # type: ignore[attr-defined]
    register_parameter_init(
        param,
        init_method,
        partition_dim=partition_dim,
        tp_group=group,
        stride=stride,
        perform_initialization=config.perform_initialization,
    )
    return param


class _TensorParallelModule(nn.Module):
    """What the three layers below share: the group they are cut over, and checkpointing by axis."""

    sharded_axes: dict[str, int]
    """Axis along which each parameter is cut; parameters not named are whole on every rank."""
    cut: str | None = None
    """Of a matrix, whether it is cut by output features (column) or input features (row); None for what multiplies
    nothing."""

    def __init__(self, config: ModelParallelConfig, tp_group: ProcessGroup | None, is_expert: bool = False) -> None:
        super().__init__()
        self.config = config
        self.is_expert = is_expert
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group, is_expert=is_expert)
        self.world_size = get_pg_size(self.tp_group)
        # Experts communicate in their token dispatcher.
        self.explicit_expert_comm = is_expert and (self.world_size > 1 or config.expert_model_parallel_size > 1)
        self.sequence_parallel = config.sequence_parallel and self.world_size > 1 and not self.explicit_expert_comm
        self.overlap: OverlapPlan | None = None
        """What hides behind what, where communication is cut into pieces (`tp_comm_overlap`)."""
        self.products: LinearProducts = PLAIN_PRODUCTS
        """How the layer multiplies."""

    def use_products(self, make: Callable[[str, bool], LinearProducts]) -> None:
        """Multiply by what `make` gives for a layer that is cut like this one, of an expert or not."""
        if self.cut is not None:
            self.products = make(self.cut, self.is_expert)

    def all_products(self) -> list[LinearProducts]:
        """`products`, as one of possibly several."""
        return [self.products]

    def products_of_weights(self) -> list[tuple[nn.Parameter, list[LinearProducts]]]:
        """The weight, if the layer has one that it multiplies with, and `products`."""
        weight = self._parameters.get("weight")
        return [] if weight is None or self.cut is None else [(weight, [self.products])]

    @property
    def current_products(self) -> LinearProducts:
        """`products`, which learn from what they see in training only."""
        return self.products if self.training else self.products.for_evaluation()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each parameter as a `ShardedTensor` of its full matrix."""
        result = {}
        if (state := self.products.state()) is not None:
            result[f"{prefix}_extra_state"] = make_replicated_sharded_object(
                state, f"{prefix}_extra_state", sharded_offsets, tp_group=self.tp_group
            )
        for name, param in self.named_parameters(recurse=False):
            key = prefix + name
            if name in self.sharded_axes:
                result[key] = make_tp_sharded_tensor_for_checkpoint(
                    param,
                    key,
                    self.sharded_axes[name],
                    prepend_offsets=sharded_offsets,
                    tp_group=self.tp_group,
                )
            else:
                result[key] = make_sharded_tensor_for_checkpoint(
                    param, key, prepend_offsets=sharded_offsets, tp_group=self.tp_group
                )
        return result

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """State of the products (the scales of delayed scaling); None without any."""
        return self.products.state()

    def set_extra_state(self, state: Any) -> None:
        """Take over such a state; what is of another kind, as other implementations store for fp8, is ignored."""
        if isinstance(state, dict):
            self.products.load(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Extra state is optional: layout-free checkpoints do not store it.
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ColumnParallelLinear(_TensorParallelModule):
    """y = x Wᵀ + b with the output features cut: W [out/tp, in], b [out/tp].

    x [s, b, in] -> [s, b, out/tp]; with sequence parallelism x is [s/tp, b, in] and is all-gathered first.
    Backward all-reduces (with sequence parallelism reduce-scatters) the gradient of x while the gradient of W
    is being computed.

    Args:
        gather_output: all-gather the result to [s, b, out].
        stride: number of matrices stacked in W that are cut each on its own.
        skip_bias_add: return b instead of adding it, for fusing the addition with what follows.
        skip_weight_param_allocation: have no W; `forward` is given one (tied embeddings).
        weight_grad_queue: where backward leaves the product of W's gradient, for `config.wgrad_deferral_limit`
            microbatches (0: all); whoever handed it over runs it.
    """

    sharded_axes = {"weight": 0, "bias": 0}
    cut = "column"
    fsdp_unit = True
    """Fully sharded, its weights are gathered together."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], object],
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        embedding_activation_buffer: list[Tensor] | None = None,
        grad_output_buffer: list[Tensor] | None = None,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        disable_grad_reduce: bool = False,
        tp_group: ProcessGroup | None = None,
        weight_grad_queue: WeightGradQueue | None = None,
    ) -> None:
        super().__init__(config, tp_group, is_expert)
        if embedding_activation_buffer is not None or grad_output_buffer is not None:
            raise NotImplementedError("inputs and gradients of postponed products go into one weight_grad_queue")
        self.weight_grad_queue = weight_grad_queue
        if self.sequence_parallel:
            self.overlap = overlap_plan(config, tp_comm_buffer_name)
        self.input_size, self.output_size = input_size, output_size
        self.output_size_per_partition = divide(output_size, self.world_size)
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        self.disable_grad_reduce = disable_grad_reduce
        sharded = functools.partial(
            _sharded_parameter, config=config, partition_dim=0, group=self.tp_group, stride=stride, is_expert=is_expert
        )
        rows = self.output_size_per_partition
        self.weight: nn.Parameter | None = None
        if not skip_weight_param_allocation:
            self.weight = sharded((rows, input_size), init_method=init_method)
        self.bias = sharded((rows,), init_method=nn.init.zeros_) if bias else None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(output, bias to be added or None).

        Args:
            weight: used instead of the layer's own, [out/tp, in].
            runtime_gather_output: overrides `gather_output`.

        Raises:
            RuntimeError: the layer has no weight and none is given.
        """
        weight = self.weight if weight is None else weight
        if weight is None:
            raise RuntimeError("this layer was built with skip_weight_param_allocation: forward needs a weight")
        bias = None if self.skip_bias_add else self.bias
        if self.overlap is not None:
            output = self._overlapped(input_, weight, bias)
        else:
            reduce_grad = self.world_size > 1 and not self.explicit_expert_comm and not self.disable_grad_reduce
            output = linear_with_grad_accumulation_and_async_allreduce(
                input_,
                weight,
                bias,
                gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
                allreduce_dgrad=reduce_grad and not self.sequence_parallel,
                sequence_parallel=self.sequence_parallel,
                tp_group=self.tp_group,
                weight_grad_queue=self.weight_grad_queue,
                products=self.current_products,
            )
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gather:
            output = gather_from_tensor_model_parallel_region(output, self.tp_group)
        return output, self.bias if self.skip_bias_add else None

    def _overlapped(self, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fused = self.config.gradient_accumulation_fusion
        output = ColumnParallelOverlap.apply(input_, weight, fused, self.overlap, self.tp_group)
        return output if bias is None else output + bias


class RowParallelLinear(_TensorParallelModule):
    """y = x Wᵀ + b with the input features cut: W [out, in/tp], b [out] on every rank.

    x [s, b, in/tp] -> partial sums -> all-reduce -> [s, b, out]; with sequence parallelism they are
    reduce-scattered to [s/tp, b, out]. The bias is added after the sum.

    Args:
        input_is_parallel: x is cut already; else this rank's part is taken.
        skip_bias_add: return b instead of adding it.
    """

    sharded_axes = {"weight": 1}
    cut = "row"

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], object],
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, tp_group, is_expert)
        if config.sequence_parallel and not input_is_parallel:
            raise ValueError("sequence parallelism needs RowParallelLinear(input_is_parallel=True)")
        if self.sequence_parallel:
            self.overlap = overlap_plan(config, tp_comm_buffer_name)
        self.input_size, self.output_size = input_size, output_size
        self.input_size_per_partition = divide(input_size, self.world_size)
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        parameter = functools.partial(_sharded_parameter, config=config, group=self.tp_group, is_expert=is_expert)
        shape = (output_size, self.input_size_per_partition)
        self.weight = parameter(shape, init_method=init_method, partition_dim=1, stride=stride)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = parameter((output_size,), init_method=nn.init.zeros_, partition_dim=-1)
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(output, bias to be added or None)."""
        if not self.input_is_parallel:
            input_ = scatter_to_tensor_model_parallel_region(input_, self.tp_group)
        output = self._reduced(input_)
        if self.skip_bias_add:
            return output, self.bias
        return output if self.bias is None else output + self.bias, None

    def _reduced(self, input_: Tensor) -> Tensor:
        """x Wᵀ, summed over the ranks."""
        fused = self.config.gradient_accumulation_fusion
        if self.overlap is not None:
            return RowParallelOverlap.apply(input_, self.weight, fused, self.overlap, self.tp_group)
        partial = linear_with_grad_accumulation_and_async_allreduce(
            input_,
            self.weight,
            None,
            gradient_accumulation_fusion=fused,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
            products=self.current_products,
        )
        if self.explicit_expert_comm:
            return partial
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, self.tp_group)
        return reduce_from_tensor_model_parallel_region(partial, self.tp_group)


class VocabParallelEmbedding(_TensorParallelModule):
    """Rows of the embedding table cut over the ranks: W [v/tp, h]. Ids [b, s] -> [b, s, h].

    Each rank looks up the ids it holds, gives zeros for the others, and the parts are all-reduced.

    Args:
        reduce_scatter_embeddings: give [s/tp, b, h] by a reduce-scatter instead.
    """

    sharded_axes = {"weight": 0}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: Callable[[Tensor], object],
        reduce_scatter_embeddings: bool = False,
        config: ModelParallelConfig,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, tp_group)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        rows = divide(num_embeddings, self.world_size)
        rank = get_pg_rank(self.tp_group)
        self.vocab_start_index, self.vocab_end_index = VocabUtility.vocab_range_from_per_partition_vocab_size(
            rows, rank, self.world_size
        )
        self.weight = _sharded_parameter(
            (rows, embedding_dim), config, init_method, partition_dim=0, group=self.tp_group
        )

    def forward(self, input_: Tensor) -> Tensor:
        """Embeddings of ids [b, s]."""
        partial = embedding_lookup(
            input_,
            self.weight,
            self.vocab_start_index,
            self.config.gradient_accumulation_fusion,
            self.world_size > 1,
        )
        if self.reduce_scatter_embeddings:
            partial = partial.transpose(0, 1).contiguous()  # [s, b, h]
            return reduce_scatter_to_sequence_parallel_region(partial, self.tp_group)
        return reduce_from_tensor_model_parallel_region(partial, self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The table; its padded length may differ between checkpoint and model."""
        key = f"{prefix}weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                0,
                prepend_offsets=sharded_offsets,
                allow_shape_mismatch=True,
                tp_group=self.tp_group,
            )
        }
