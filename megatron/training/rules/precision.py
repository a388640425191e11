"""Rules about number formats and reproducibility."""

from __future__ import annotations

import argparse
import os

import torch

from megatron.core.device import device_type
from megatron.training.config.flags import all_flags
from megatron.training.settings import refuse_unless, warn, was_given

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
STATE_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
DELAYED_SETTINGS = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
FP8_SETTINGS = ("fp8_recipe", *DELAYED_SETTINGS, "fp8_wgrad", "fp8_param_gather", "first_last_layers_bf16")
SETTINGS_OF_ENDS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
DETERMINISTIC_NCCL = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


def name_state_dtypes(args: argparse.Namespace) -> None:
    """Types of the optimizer's state, by their short names."""
    for name in STATE_DTYPES:
        setattr(args, name, DTYPES.get(getattr(args, name), getattr(args, name)))


def derive_params_dtype(args: argparse.Namespace) -> None:
    """Weights have one type."""
    refuse_unless(not (args.fp16 and args.bf16), "--fp16 and --bf16 exclude each other; choose one")
    args.params_dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32


def tolerate_overflow_of_dynamic_scale(args: argparse.Namespace) -> None:
    """A dynamic loss scale finds its size by overflowing, so infinite gradients are no fault."""
    if args.fp16 and args.loss_scale is None and args.check_for_nan_in_loss_and_grad:
        args.check_for_nan_in_loss_and_grad = False
        warn(args, "--fp16 with a dynamic loss scale: the check for NaN in loss and gradients is switched off")


def derive_gradient_dtype(args: argparse.Namespace) -> None:
    """bfloat16 has too few digits to add many gradients up: they are summed in float32 unless told not to."""
    if not args.bf16:
        return
    full = args.main_grads_dtype == torch.float32
    if args.accumulate_allreduce_grads_in_fp32:
        refuse_unless(full, "--accumulate-allreduce-grads-in-fp32 with --bf16 needs --main-grads-dtype fp32")
    if args.grad_reduce_in_bf16:
        refuse_unless(
            not was_given(args, "accumulate_allreduce_grads_in_fp32"),
            "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other",
        )
        args.accumulate_allreduce_grads_in_fp32 = False
    elif full:
        args.accumulate_allreduce_grads_in_fp32 = True


def require_precision_aware_optimizer_fits(args: argparse.Namespace) -> None:
    """Only a state that is split over ranks has types of its own, and gradients have the type that is summed in."""
    if args.use_precision_aware_optimizer:
        refuse_unless(
            args.use_distributed_optimizer and args.optimizer == "adam",
            "--use-precision-aware-optimizer needs --use-distributed-optimizer and --optimizer adam "
            f"(found {args.optimizer})",
        )
    for name in STATE_DTYPES:
        refuse_unless(
            args.use_precision_aware_optimizer or getattr(args, name) == torch.float32,
            f"{all_flags()[name].names[0]} needs --use-precision-aware-optimizer; else only fp32 works",
        )
    refuse_unless(
        args.main_grads_dtype == torch.float32 or args.bf16,
        "--main-grads-dtype bf16 needs --bf16: gradients are summed in the type of the weights, or in fp32",
    )
    refuse_unless(
        args.main_params_dtype == torch.float32 or args.bf16 or args.fp16,
        "--main-params-dtype fp16 needs --bf16 or --fp16: fp32 weights are their own main weights",
    )


def require_half_precision_for_its_options(args: argparse.Namespace) -> None:
    """Some options only mean something beside half-precision weights."""
    if args.fp16_lm_cross_entropy:
        refuse_unless(args.fp16, "--fp16-lm-cross-entropy needs --fp16")
    if args.fp32_residual_connection:
        refuse_unless(args.fp16 or args.bf16, "--fp32-residual-connection needs --fp16 or --bf16")


def require_fp8_fits(args: argparse.Namespace) -> None:
    """Products in fp8 round to bf16, whose range they share; settings of fp8 say nothing without them."""
    if args.fp8:
        refuse_unless(args.bf16, f"--fp8-format {args.fp8} needs --bf16")
        if args.fp8_recipe != "delayed":
            _require_default(args, DELAYED_SETTINGS, f"--fp8-recipe delayed (found {args.fp8_recipe})")
    else:
        _require_default(args, FP8_SETTINGS, "--fp8-format")
    if not args.first_last_layers_bf16:
        _require_default(args, SETTINGS_OF_ENDS, "--first-last-layers-bf16")


def _require_default(args: argparse.Namespace, names: tuple[str, ...], needed: str) -> None:
    """A value that would change nothing is refused; the one that is there anyway may be written out."""
    given = [flag.names[0] for name in names if getattr(args, name) != (flag := all_flags()[name]).default]
    refuse_unless(not given, f"{' '.join(given)}: no effect without {needed}")


def force_fp32_softmax_under_layer_scaling(args: argparse.Namespace) -> None:
    """Scores divided by the layer's number are scaled up inside the softmax, beyond float16's range."""
    if args.apply_query_key_layer_scaling:
        args.attention_softmax_in_fp32 = True


def require_deterministic_kernels(args: argparse.Namespace) -> None:
    """Some kernels add in an order that varies. The choice among NCCL's algorithms matters on CUDA only."""
    if not args.deterministic_mode:
        return
    for name in ("use_flash_attn", "cross_entropy_loss_fusion"):
        refuse_unless(not getattr(args, name), f"--deterministic-mode does not work with --{name.replace('_', '-')}")
    if device_type() == "cuda":
        found = os.getenv("NCCL_ALGO")
        refuse_unless(
            found in DETERMINISTIC_NCCL,
            "--deterministic-mode needs the environment variable NCCL_ALGO to be one of "
            f"{', '.join(DETERMINISTIC_NCCL)}; found {found}",
        )


PRECISION_RULES = (
    name_state_dtypes,
    derive_params_dtype,
    tolerate_overflow_of_dynamic_scale,
    derive_gradient_dtype,
    require_precision_aware_optimizer_fits,
    require_half_precision_for_its_options,
    require_fp8_fits,
    force_fp32_softmax_under_layer_scaling,
    require_deterministic_kernels,
)
