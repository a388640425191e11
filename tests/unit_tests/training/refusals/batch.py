"""Refusals of the rules about batch sizes and the length of training."""

from __future__ import annotations

from megatron.training.rules import batch
from tests.unit_tests.training.refusals.refusal import Refusal
from tests.unit_tests.training.settings_for_tests import SAMPLES

REFUSALS = [
    Refusal(batch.require_micro_batch_size, "is required and must be positive", "--micro-batch-size 0"),
    Refusal(batch.derive_global_batch_size, "must be positive", "--global-batch-size 0"),
    Refusal(batch.require_batch_divides_over_ranks, r"must be divisible by 2, --micro", "--global-batch-size 3"),
    Refusal(
        batch.require_batch_divides_over_ranks,
        "is less than one microbatch",
        "--global-batch-size 1 --decrease-batch-size-if-needed",
    ),
    Refusal(batch.require_valid_rampup, "three whole numbers", "--rampup-batch-size 2 2", base=SAMPLES),
    Refusal(batch.require_valid_rampup, "three whole numbers", "--rampup-batch-size 2 two 10", base=SAMPLES),
    Refusal(batch.require_valid_rampup, "must be positive", "--rampup-batch-size 2 0 10", base=SAMPLES),
    Refusal(
        batch.require_valid_rampup,
        "in whole increments",
        "--rampup-batch-size 4 3 10 --global-batch-size 8",
        base=SAMPLES,
    ),
    Refusal(
        batch.require_valid_rampup, "divisible by 2", "--rampup-batch-size 3 5 10 --global-batch-size 8", base=SAMPLES
    ),
    Refusal(batch.require_lengths_in_steps, "it excludes --train-samples", "--train-samples 5"),
    Refusal(batch.require_lengths_in_steps, "use --lr-decay-iters", "--lr-decay-samples 5"),
    Refusal(batch.require_lengths_in_steps, "use --lr-warmup-iters", "--lr-warmup-samples 5"),
    Refusal(batch.require_lengths_in_steps, "needs --train-samples", "--rampup-batch-size 2 2 8 --global-batch-size 4"),
    Refusal(
        batch.require_lengths_in_steps,
        "exclude each other; give one of them",
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
    ),
    Refusal(batch.require_lengths_in_samples, "use --lr-decay-samples", "--lr-decay-iters 5", base=SAMPLES),
    Refusal(batch.require_lengths_in_samples, "use --lr-warmup-samples", "--lr-warmup-iters 5", base=SAMPLES),
    Refusal(
        batch.require_lengths_in_samples,
        "exclude each other",
        "--lr-warmup-fraction 0.1 --lr-warmup-samples 2",
        base=SAMPLES,
    ),
    Refusal(batch.require_positive_length, "--skip-train only evaluates", "--train-iters 0"),
]
