"""Optimizers for models that are cut over ranks, and the function that chooses one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.fsdp_optimizer import FullyShardedOptimizer
from megatron.core.optimizer.fused_adam import FusedAdam
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.megatron_optimizer import InitStateFn
from megatron.core.optimizer.muon import MatrixPart, Muon, is_matrix
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import (
    ParamCondition,
    ParamGroup,
    build_param_groups,
    empty_group_of_experts,
)
from megatron.core.optimizer.precision_aware_adam import PrecisionAwareAdam
from megatron.core.optimizer.precision_aware_optimizer import PrecisionAwareDistributedOptimizer
from megatron.core.optimizer.state import init_adam_state, init_muon_state, init_sgd_state
from megatron.core.process_groups_config import (
    ProcessGroupCollection,
    default_process_groups,
    has_default_process_groups,
)
from megatron.core.utils import get_pg_rank, get_pg_size, unwrap_model

__all__ = [
    "ChainedOptimizer",
    "ConstantGradScaler",
    "DistributedOptimizer",
    "DynamicGradScaler",
    "FP32Optimizer",
    "Float16OptimizerWithFloat16Params",
    "MegatronGradScaler",
    "MegatronOptimizer",
    "OptimizerConfig",
    "PrecisionAwareDistributedOptimizer",
    "get_megatron_optimizer",
]


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: Sequence[torch.nn.Module],
    no_weight_decay_cond: ParamCondition | None = None,
    scale_lr_cond: ParamCondition | None = None,
    lr_mult: float = 1.0,
    use_gloo_process_groups: bool = True,
) -> MegatronOptimizer:
    """The optimizer that `config` asks for, over the trainable parameters of all chunks.

    Dense weights and experts get one each, chained if both exist; also on a pipeline stage without experts of a model
    that has some, whose second one is empty but takes part in what all of them sum. Groups of ranks are those that the
    chunks (`DistributedDataParallel`) reduce gradients over, or the ones of `parallel_state`.

    Args:
        config: algorithm, precision, sharding.
        model_chunks: virtual pipeline stages of this rank, wrapped in `DistributedDataParallel`. Plain
            modules work without the distributed optimizer; their gradients are then taken from `param.grad`.
        no_weight_decay_cond: (name, parameter) -> whether it does not decay; default biases and 1-D
            parameters.
        scale_lr_cond: (name, parameter) -> whether its learning rate is multiplied by `lr_mult`.
        lr_mult: see `scale_lr_cond`.
        use_gloo_process_groups: collect sharded state for checkpoints over gloo, in host memory.
    """
    if config.lr is None:
        raise ValueError("lr is not set; the optimizer needs a (peak) learning rate")
    optimizers = []
    for is_expert, chunks in _shares(config, model_chunks):
        groups = build_param_groups(config, chunks, no_weight_decay_cond, scale_lr_cond, lr_mult)
        own = [group for group in groups if group["is_expert_parallel"] is is_expert]
        if is_expert and not own and groups and _elsewhere_are_experts(model_chunks):
            own = [empty_group_of_experts(config)]
        if own:
            optimizers.append(_build(config, chunks, own, use_gloo_process_groups, is_expert=is_expert))
    if not optimizers:
        raise ValueError("the model has no trainable parameters")
    return optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)


def _elsewhere_are_experts(model_chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether other stages of the model may have experts whose replicas are not those of dense weights."""
    config = getattr(unwrap_model(model_chunks[0]), "config", None)
    if config is None or getattr(config, "num_moe_experts", None) is None:
        return False
    return bool(config.experts_have_own_replicas)


def _shares(
    config: OptimizerConfig, model_chunks: Sequence[torch.nn.Module]
) -> Iterator[tuple[bool, Sequence[torch.nn.Module]]]:
    """(experts or dense weights, chunks) that get an optimizer of their own.

    To gather the first chunk's weights while the others are still being updated, its update must be one of its
    own.
    """
    if config.overlap_param_gather_with_optimizer_step and len(model_chunks) > 1:
        yield False, model_chunks[:1]
        yield False, model_chunks[1:]
    else:
        yield False, model_chunks
    yield True, model_chunks


def _build(
    config: OptimizerConfig,
    model_chunks: Sequence[Any],
    param_groups: list[ParamGroup],
    use_gloo: bool,
    *,
    is_expert: bool,
) -> MegatronOptimizer:
    default = default_process_groups() if has_default_process_groups() else ProcessGroupCollection()
    grad_pgs = getattr(model_chunks[0], "grad_comm_pgs", default)
    model_pgs = getattr(model_chunks[0], "model_comm_pgs", default)
    model_parallel_group = model_pgs.tp_ep_pp if is_expert else model_pgs.mp
    inner, init_state_fn = _inner_optimizer(config, param_groups)
    scaler = _grad_scaler(config)
    optimizer: MegatronOptimizer
    if config.use_distributed_optimizer:
        _require_distributed_data_parallel(model_chunks)
        data_parallel_group = (
            grad_pgs.intra_expt_dp or grad_pgs.expt_dp if is_expert else grad_pgs.intra_dp_cp or grad_pgs.dp_cp
        )
        form = PrecisionAwareDistributedOptimizer if config.use_precision_aware_optimizer else DistributedOptimizer
        optimizer = form(
            inner,
            config,
            scaler,
            init_state_fn,
            model_chunks,
            {
                i: chunk.expert_param_and_grad_buffers if is_expert else chunk.param_and_grad_buffers
                for i, chunk in enumerate(model_chunks)
            },
            data_parallel_group,
            _gloo_twin(data_parallel_group) if use_gloo else None,
            data_parallel_group_idx=get_pg_rank(model_parallel_group),
            distributed_optimizer_instance_id=get_pg_rank(grad_pgs.inter_dist_opt),
        )
        if get_pg_size(data_parallel_group) > 1 and grad_pgs.intra_dist_opt is None:
            raise ValueError("grad_comm_pgs lacks intra_dist_opt, over which the distributed optimizer sums norms")
        optimizer.grad_stats_parallel_group = grad_pgs.intra_dist_opt
    elif isinstance(model_chunks[0], TorchFullyShardedDataParallel):
        if config.optimizer == "muon":
            raise ValueError("optimizer muon does not work with fully sharded weights; use the distributed optimizer")
        optimizer = FullyShardedOptimizer(inner, config, init_state_fn, model_chunks)
        optimizer.grad_stats_parallel_group = model_pgs.tp_dp_cp
    else:
        if config.fp16 or config.bf16:
            optimizer = Float16OptimizerWithFloat16Params(inner, config, scaler, init_state_fn)
        else:
            optimizer = FP32Optimizer(inner, config, init_state_fn)
        optimizer.grad_stats_parallel_group = model_parallel_group
    optimizer.tensor_parallel_group = model_pgs.expt_tp if is_expert else model_pgs.tp
    if isinstance(inner, Muon):
        _name_matrices(inner, optimizer, model_chunks)
    return optimizer


def _name_matrices(inner: Muon, optimizer: MegatronOptimizer, model_chunks: Sequence[torch.nn.Module]) -> None:
    """Tell Muon which parameters are matrices, and how to get the whole of those that are cut into ranges."""
    chosen = {
        param for chunk in model_chunks for name, param in chunk.named_parameters() if is_matrix(name, param)
    }  # fmt: skip
    inner.take_matrices(
        {
            main: MatrixPart.of(param, optimizer.first_element(main), main.numel(), optimizer.tensor_parallel_group)
            for param, main in optimizer.pairs()
            if param in chosen
        }
    )
    if isinstance(optimizer, DistributedOptimizer):
        inner.whole_of_parts = partial(optimizer.whole_of_parts, chosen)


def _require_distributed_data_parallel(model_chunks: Sequence[torch.nn.Module]) -> None:
    for chunk in model_chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise ValueError(
                "use_distributed_optimizer needs model chunks wrapped in DistributedDataParallel, "
                f"got {type(chunk).__name__}"
            )


def _gloo_twin(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group itself where it moves host memory anyway."""
    is_gloo = group is not None and dist.is_initialized() and dist.get_backend(group) == "gloo"
    return group if is_gloo else None


def _inner_optimizer(
    config: OptimizerConfig, param_groups: list[ParamGroup]
) -> tuple[torch.optim.Optimizer, InitStateFn]:
    """torch's fused update rules: one pass over memory, on CPU four times as fast as the looped ones."""
    if config.use_precision_aware_optimizer:
        return PrecisionAwareAdam(param_groups, config), lambda optimizer: None
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    match config.optimizer:
        case "adam":
            return FusedAdam(param_groups, config), init_adam_state
        case "sgd":
            return torch.optim.SGD(param_groups, momentum=config.sgd_momentum, **common), init_sgd_state
        case "muon":
            return Muon(param_groups, config), init_muon_state  # type: ignore[return-value]
        case _:
            raise ValueError(f"optimizer ({config.optimizer}) must be adam, sgd or muon")


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """Constant if a scale is given, dynamic for fp16, else none."""
    if config.loss_scale is not None:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=int(config.loss_scale_window),
        hysteresis=config.hysteresis,
    )
