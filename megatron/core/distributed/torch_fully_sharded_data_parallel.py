"""Weights, gradients and optimizer state cut over data parallel ranks by torch's `fully_shard` (ZeRO stage 3,
arXiv:1910.02054, section 5.3; PyTorch FSDP, arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.core import device
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.fsdp_shards import ParamRows, describe_rows, own_rows, rows_with_values
from megatron.core.process_groups_config import ProcessGroupCollection, default_process_groups
from megatron.core.tensor_parallel.initialization import initial_value, require_init_spec
from megatron.core.utils import get_pg_size

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class TorchFullyShardedDataParallel(_BaseDataParallel):
    """`module`, of which each data × context parallel rank keeps a part of every parameter.

    A unit's weights are gathered before its forward and again before its backward, and its gradients are
    reduce-scattered after every microbatch, each overlapped with the computation of other units. Gradients
    accumulate in the kept part, `param.grad`, as their mean over the ranks (`config.calculate_per_token_loss`:
    their sum). Kept parts are fp32 whatever type the layers compute in: they are the main parameters, so that
    the optimizer needs no others. A half precision model is rounded once, as it is without sharding.

    Tensor parallelism goes before: what is cut here is this rank's tensor parallel shard.

    Args:
        config: the model's.
        ddp_config: `grad_reduce_in_fp32` is the type gradients travel in, `reshard_after_forward` (of
            `TorchFullyShardedDataParallelConfig`) whether weights are freed between forward and backward.
        module: the model; on the meta device it gets memory and its initial values here, one parameter at a
            time.
        sub_modules_to_wrap: classes of the units; default those with an attribute `fsdp_unit`: transformer layers,
            the embedding, column-parallel linear layers (that are not part of another unit). A module may name more
            classes in an attribute `_fsdp_modules`. What holds a tied embedding is part of the root, whose weights
            stay gathered from the first use to the last.
        process_group: ranks to cut over; default data × context parallel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        sub_modules_to_wrap: Collection[type[nn.Module]] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, module)
        self.ddp_config = ddp_config
        groups: ProcessGroupCollection = default_process_groups()
        self.process_group = group = process_group or groups.dp_cp
        assert group is not None
        self.model_comm_pgs = groups
        self.bare = innermost(module)
        """The model itself: names of parameters are its own."""
        compute_dtype = next(param.dtype for param in module.parameters())
        attributes = {name: dict(param.__dict__) for name, param in self.bare.named_parameters()}
        module.float()  # what is kept; it has been rounded to the type of computing already

        named_by_modules = (unit for m in module.modules() for unit in getattr(m, "_fsdp_modules", ()))
        classes = (*(sub_modules_to_wrap or ()), *named_by_modules)
        by_default = sub_modules_to_wrap is None
        tied = tied_weights(self.bare)

        def is_unit(m: nn.Module) -> bool:
            wanted = isinstance(m, classes) or (by_default and getattr(m, "fsdp_unit", False))
            return wanted and tied.isdisjoint(m.parameters())

        self.units = list(outermost(module, is_unit))
        options: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(group, device.device_type(), mesh_dim_names=("dp_cp",)),
            "mp_policy": self._precision(compute_dtype),
        }
        reshard = getattr(ddp_config, "reshard_after_forward", True)
        for unit in self.units:
            fully_shard(unit, reshard_after_forward=reshard, **options)
        # What the root keeps for itself is needed again at once, by backward.
        fully_shard(module, reshard_after_forward=False, **options)
        self._prefetch_for_recompute()
        is_meta = any(param.is_meta for param in module.parameters())
        if is_meta:
            allocate(module)
        for name, param in self.bare.named_parameters():
            param.__dict__.update(attributes[name])
        self.rows: list[ParamRows] = own_rows(self.bare)
        if is_meta:
            self._fill(compute_dtype)

    def _precision(self, compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
        """Inputs are not cast: the model decides which of them (rotary angles, residuals) are fp32."""
        if compute_dtype == torch.float32:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        reduce_dtype = torch.float32 if self.ddp_config.grad_reduce_in_fp32 else compute_dtype
        return MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False)

    def _prefetch_for_recompute(self) -> None:
        """Backward gathers the unit before while a unit is recomputed; torch's own guess comes too late there."""
        if self.config.recompute_granularity == "full":
            for before, unit in zip(self.units, self.units[1:]):
                assert isinstance(unit, FSDPModule) and isinstance(before, FSDPModule)
                unit.set_modules_to_backward_prefetch([before])

    def _fill(self, compute_dtype: torch.dtype) -> None:
        """Give the kept rows what the whole parameters would start with, in the type they would have."""
        global_name = getattr(self.bare, "global_parameter_name", lambda name: name)
        for one in self.rows:
            require_init_spec(one.name, one.param)
            spec = one.param.init_spec  # type: ignore[attr-defined]
            whole = initial_value(one.param.shape, compute_dtype, spec, global_name(one.name))
            one.local.copy_(whole[one.first_row : one.first_row + len(one.local)])

    def _fsdp_modules(self) -> Iterator[FSDPModule]:
        return (m for m in self.module.modules() if isinstance(m, FSDPModule))

    def reshard(self) -> None:
        """Free weights that a forward without backward has left gathered."""
        for fsdp_module in self._fsdp_modules():
            fsdp_module.reshard()

    # --- gradients ---

    def _grads(self) -> Iterator[Tensor]:
        for one in self.rows:
            if one.param.grad is not None:
                yield local_part(one.param.grad)

    def finish_grad_sync(self) -> None:
        """Gradients are complete after backward; what torch made a mean becomes a sum where that is wanted.

        Raises:
            RuntimeError: a gradient is not finite.
        """
        if self.config.calculate_per_token_loss:
            self.scale_gradients(float(get_pg_size(self.process_group)))
        if not self.ddp_config.check_for_nan_in_grad:
            return
        for one in self.rows:
            if one.param.grad is None:
                continue
            grad = local_part(one.param.grad)
            if not bool(torch.isfinite(grad).all()):
                raise RuntimeError(
                    f"gradient of {one.name} has {int((~torch.isfinite(grad)).sum())} NaN or infinite values of "
                    f"{grad.numel()} on rank {torch.distributed.get_rank()}, after the data-parallel reduction"
                )

    def scale_gradients(self, scaling_factor: float) -> None:
        grads = list(self._grads())
        if grads:
            torch._foreach_mul_(grads, scaling_factor)

    def zero_grad_buffer(self) -> None:
        for one in self.rows:
            one.param.grad = None

    # --- weights ---

    def broadcast_params(self) -> None:
        raise NotImplementedError("replicas of which each rank keeps a part cannot be overwritten by the first one's")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self.reshard()
        return super().state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        raise NotImplementedError("a file of whole parameters: fully sharded weights are saved as torch_dist")

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's description of its shards, as boxes of the rows that this rank keeps."""
        self.reshard()
        return describe_rows(super().sharded_state_dict(prefix, *args, **kwargs), self.rows)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill the kept rows from `state_dict`, which has either them or whole parameters, under local names."""
        self.reshard()
        with torch.no_grad():
            for one, value in rows_with_values(self.rows, state_dict, strict):
                one.local.copy_(value)


def tied_weights(model: nn.Module) -> set[nn.Parameter]:
    """The embedding that a model also uses as its output layer, if it does."""
    if not getattr(model, "share_embeddings_and_output_weights", False):
        return set()
    return {model.shared_embedding_or_output_weight()}  # type: ignore[operator]


def outermost(module: nn.Module, is_unit: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Submodules that are units, have parameters and are not inside another one, in the order of forward."""
    for child in module.children():
        if is_unit(child) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from outermost(child, is_unit)


def innermost(module: nn.Module) -> nn.Module:
    """The model inside of wrappers."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def allocate(module: nn.Module) -> None:
    """Give parameters on the meta device memory, without values; buffers keep theirs."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if not buffer.is_meta}
    module.to_empty(device=device.current_device())
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def local_part(tensor: Tensor) -> Tensor:
    """What this rank keeps of a sharded tensor, without communication; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
