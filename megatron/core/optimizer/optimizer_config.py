"""What updates the weights: algorithm, precision, loss scale and sharding of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron.core.config_rules import require, require_one_of, shown
from megatron.core.not_built import refuse_fields_not_built


@dataclass
class OptimizerConfig:
    """Settings of `get_megatron_optimizer`. Each field's docstring is also its flag's help."""

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """Update rule; `muon` is one for the matrices inside of a model, with Adam for the rest."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate that the decay ends in."""
    decoupled_lr: float | None = None
    """Own peak learning rate of the input embedding and the output layer."""
    decoupled_min_lr: float | None = None
    """Own final learning rate of the input embedding and the output layer."""
    weight_decay: float = 0.01
    """Strength of the weight decay."""
    fp8_recipe: str | None = None
    """Scaling scheme of fp8 weights."""
    fp16: bool = False
    """Weights are float16, the main copy float32, the loss scaled."""
    bf16: bool = False
    """Weights are bfloat16, the main copy float32."""
    reuse_grad_buf_for_mxfp8_param_ag: bool = False
    """Gather mxfp8 weights through the gradient buffer."""
    torch_compile: bool = False
    """Compile Adam's update into one kernel."""
    params_dtype: torch.dtype = torch.float32
    """Type of the weights that the layers compute with."""
    use_precision_aware_optimizer: bool = False
    """Keep the optimizer's state in the types given below instead of float32."""
    store_param_remainders: bool = True
    """Of a float32 main weight, store only the bits that its bfloat16 copy lacks."""
    main_grads_dtype: torch.dtype = torch.float32
    """Type of the gradients that the update reads."""
    main_params_dtype: torch.dtype = torch.float32
    """Type of the main weights."""
    exp_avg_dtype: torch.dtype = torch.float32
    """Type of Adam's first moment."""
    exp_avg_sq_dtype: torch.dtype = torch.float32
    """Type of Adam's second moment."""
    loss_scale: float | None = None
    """Fixed loss scale for float16; unset is a dynamic one."""
    initial_loss_scale: float = 2**32
    """Loss scale that a dynamic one starts from."""
    min_loss_scale: float = 1.0
    """Smallest dynamic loss scale."""
    loss_scale_window: float = 1000
    """Steps without overflow before the loss scale doubles."""
    hysteresis: int = 2
    """Overflows that are tolerated before the loss scale halves."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-08
    """Added to Adam's denominator."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_use_nesterov: bool = False
    """Muon looks one step ahead along its momentum (Nesterov)."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations of Muon."""
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = "spectral"
    """Factor on Muon's update of a matrix of r rows and c columns: sqrt(max(r, c)), sqrt(max(1, r/c)), sqrt(r/c)."""
    muon_extra_scale_factor: float = 0.2
    """Further factor on it; 0.2 with `spectral` makes steps as large as Adam's usual ones, which share the rate."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state and work over the data parallel ranks (ZeRO, stage 1)."""
    overlap_param_gather_with_optimizer_step: bool = False
    """Start gathering the first bucket's weights while later buckets are still being updated."""
    optimizer_cpu_offload: bool = False
    """Keep the precision-aware optimizer's state in host memory and update there."""
    optimizer_offload_fraction: float = 0.0
    """Share of the weights that this concerns."""
    use_torch_optimizer_for_cpu_offload: bool = False
    """Update that share with torch's own Adam. The update is always that one here."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap that update with the copies to and from the device."""
    pin_cpu_grads: bool = True
    """Offloaded gradients lie in pinned memory."""
    pin_cpu_params: bool = True
    """Offloaded weights lie in pinned memory."""
    clip_grad: float = 1.0
    """Ceiling of the global gradient norm; 0 switches clipping off."""
    log_num_zeros_in_grad: bool = False
    """Count and log the zeros among the gradients."""
    barrier_with_L1_time: bool = False
    """Put a barrier around level-1 timers."""
    timers: Callable[..., Any] | None = None
    """`timers(name, log_level)` gives the timer of that name."""
    config_logger_dir: str = ""
    """Folder to write this configuration to; empty writes none."""

    def __post_init__(self) -> None:
        for rule in (
            refuse_fields_not_built,
            require_known_optimizer,
            require_valid_muon,
            require_one_half_precision,
            require_fp32_states,
            require_precision_aware_optimizer_fits,
            require_known_state_types,
            require_offload_fits,
            require_min_lr_below_lr,
            require_valid_loss_scale,
        ):
            rule(self)


def require_known_optimizer(config: OptimizerConfig) -> None:
    """Three update rules exist."""
    require_one_of(config, "optimizer", ("adam", "sgd", "muon"))


def require_valid_muon(config: OptimizerConfig) -> None:
    """Momentum is a mean; without iterations nothing is orthogonal."""
    require_one_of(config, "muon_scale_mode", ("spectral", "shape_scaling", "unit_rms_norm"))
    require(0 <= config.muon_momentum < 1, f"{shown(config, 'muon_momentum')} must be at least 0 and below 1")
    require(config.muon_num_ns_steps > 0, f"{shown(config, 'muon_num_ns_steps')} must be positive")


def require_one_half_precision(config: OptimizerConfig) -> None:
    """Weights have one type."""
    require(not (config.fp16 and config.bf16), "fp16 and bf16 exclude each other; choose one")


def require_fp32_states(config: OptimizerConfig) -> None:
    """Without the precision-aware optimizer all of its state is float32."""
    if not config.use_precision_aware_optimizer:
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            require(
                getattr(config, name) == torch.float32,
                f"{shown(config, name)} needs use_precision_aware_optimizer; else only torch.float32 works",
            )


STATE_TYPES = {
    "main_grads_dtype": (torch.float32, torch.bfloat16),
    "main_params_dtype": (torch.float32, torch.float16),
    "exp_avg_dtype": (torch.float32, torch.float16, torch.bfloat16, torch.uint8),
    "exp_avg_sq_dtype": (torch.float32, torch.float16, torch.bfloat16, torch.uint8),
}
"""Types that each part of the precision-aware optimizer's state can have; uint8 stands for fp8 (e4m3)."""


def require_precision_aware_optimizer_fits(config: OptimizerConfig) -> None:
    """It is a form of Adam that is split over data parallel ranks."""
    if config.use_precision_aware_optimizer:
        require(
            config.optimizer == "adam" and config.use_distributed_optimizer,
            f"use_precision_aware_optimizer needs optimizer adam and use_distributed_optimizer, found "
            f"{shown(config, 'optimizer')} and {shown(config, 'use_distributed_optimizer')}",
        )


def require_known_state_types(config: OptimizerConfig) -> None:
    """What is to have 16 bits is 16-bit where it comes from."""
    for name, types in STATE_TYPES.items():
        require(getattr(config, name) in types, f"{shown(config, name)} must be one of {', '.join(map(str, types))}")
    if config.main_grads_dtype != torch.float32:
        require(
            config.params_dtype == config.main_grads_dtype,
            f"{shown(config, 'main_grads_dtype')} needs weights of that type (bf16), whose gradients are then not "
            f"widened; found {shown(config, 'params_dtype')}",
        )
    if config.main_params_dtype != torch.float32:
        require(
            config.params_dtype != torch.float32,
            f"{shown(config, 'main_params_dtype')} needs 16-bit weights (bf16 or fp16): float32 weights are their own "
            "main weights",
        )


def require_offload_fits(config: OptimizerConfig) -> None:
    """What lies in host memory is a share of the precision-aware optimizer's state."""
    if not config.optimizer_cpu_offload:
        return
    require(config.use_precision_aware_optimizer, "optimizer_cpu_offload needs use_precision_aware_optimizer")
    require(
        0.0 <= config.optimizer_offload_fraction <= 1.0,
        f"{shown(config, 'optimizer_offload_fraction')} must be between 0 and 1",
    )


def require_min_lr_below_lr(config: OptimizerConfig) -> None:
    """The decay ends below where it starts."""
    if config.lr is not None and config.min_lr is not None:
        require(config.min_lr <= config.lr, f"{shown(config, 'min_lr')} must not exceed {shown(config, 'lr')}")


def require_valid_loss_scale(config: OptimizerConfig) -> None:
    """A loss scale divides gradients, so it is positive."""
    for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
        value = getattr(config, name)
        require(value is None or value > 0, f"{shown(config, name)} must be positive")
