"""Refusals of the rules about number formats."""

from __future__ import annotations

from megatron.training.rules import precision
from tests.unit_tests.training.refusals.refusal import Refusal

PRECISION_AWARE = "--use-distributed-optimizer --use-precision-aware-optimizer"

REFUSALS = [
    Refusal(
        precision.require_precision_aware_optimizer_fits,
        "needs --use-distributed-optimizer and --optimizer adam",
        "--use-precision-aware-optimizer",
    ),
    Refusal(
        precision.require_precision_aware_optimizer_fits,
        "--exp-avg-dtype needs --use-precision-aware-optimizer",
        "--exp-avg-dtype bf16",
    ),
    Refusal(
        precision.require_precision_aware_optimizer_fits,
        "--main-grads-dtype bf16 needs --bf16",
        f"{PRECISION_AWARE} --main-grads-dtype bf16",
    ),
    Refusal(
        precision.require_precision_aware_optimizer_fits,
        "fp32 weights are their own main weights",
        f"{PRECISION_AWARE} --main-params-dtype fp16",
    ),
    Refusal(precision.derive_params_dtype, "--fp16 and --bf16 exclude each other", "--fp16 --bf16"),
    Refusal(
        precision.derive_gradient_dtype,
        "exclude each other",
        "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
    ),
    Refusal(
        precision.require_half_precision_for_its_options,
        "--fp16-lm-cross-entropy needs --fp16",
        "--fp16-lm-cross-entropy",
    ),
    Refusal(
        precision.require_half_precision_for_its_options,
        "--fp32-residual-connection needs --fp16 or --bf16",
        "--fp32-residual-connection",
    ),
    Refusal(precision.require_fp8_fits, "--fp8-format hybrid needs --bf16", "--fp8-format hybrid"),
    Refusal(
        precision.require_fp8_fits,
        "--fp8-recipe --no-fp8-wgrad: no effect without --fp8-format",
        "--bf16 --fp8-recipe tensorwise --no-fp8-wgrad",
    ),
    Refusal(
        precision.require_fp8_fits,
        r"--fp8-margin --fp8-amax-history-len: no effect without --fp8-recipe delayed \(found blockwise\)",
        "--bf16 --fp8-format e4m3 --fp8-recipe blockwise --fp8-margin 2 --fp8-amax-history-len 16",
    ),
    Refusal(
        precision.require_fp8_fits,
        "--num-layers-at-end-in-bf16: no effect without --first-last-layers-bf16",
        "--bf16 --fp8-format e4m3 --fp8-recipe tensorwise --num-layers-at-end-in-bf16 2",
    ),
    Refusal(
        precision.require_deterministic_kernels,
        "does not work with --cross-entropy-loss-fusion",
        "--deterministic-mode --cross-entropy-loss-fusion",
    ),
]
