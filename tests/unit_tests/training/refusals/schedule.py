"""Refusals of the rules about learning rates, weight decay and recompute."""

from __future__ import annotations

from megatron.training.rules import schedule
from tests.unit_tests.training.refusals.refusal import Refusal
from tests.unit_tests.training.settings_for_tests import SAMPLES

REFUSALS = [
    Refusal(schedule.require_ordered_learning_rates, r"--min-lr \(1.0\) must not exceed --lr", "--min-lr 1"),
    Refusal(schedule.require_ordered_learning_rates, "must not be negative", "--min-lr -1"),
    Refusal(schedule.require_ordered_learning_rates, "must not exceed --lr", "--lr-warmup-init 1"),
    Refusal(
        schedule.require_ordered_learning_rates,
        "must not exceed --decoupled-lr",
        "--decoupled-lr 1 --decoupled-min-lr 2",
    ),
    Refusal(schedule.require_warmup_within_decay, "must be below --lr-decay-iters", "--lr-warmup-iters 10"),
    Refusal(schedule.require_warmup_within_decay, "and below 1", "--lr-warmup-fraction 1"),
    Refusal(schedule.require_warmup_within_decay, "must be positive", "--lr-decay-iters 0"),
    Refusal(schedule.require_length_of_last_decay, "needs --lr-wsd-decay-iters", "--lr-decay-style WSD"),
    Refusal(
        schedule.require_length_of_last_decay, "needs --lr-wsd-decay-samples", "--lr-decay-style WSD", base=SAMPLES
    ),
    Refusal(schedule.derive_weight_decay, "needs --weight-decay-incr-style", "--start-weight-decay 1"),
    Refusal(schedule.derive_weight_decay, "needs --start-weight-decay", "--weight-decay-incr-style linear"),
    Refusal(
        schedule.derive_weight_decay,
        "must rise",
        "--weight-decay-incr-style cosine --start-weight-decay 2 --end-weight-decay 1",
    ),
    Refusal(
        schedule.require_one_source_of_schedule,
        "exclude each other",
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
    ),
    Refusal(
        schedule.require_complete_recompute,
        "needs --tensor-model-parallel-size above 1",
        "--distribute-saved-activations",
    ),
    Refusal(
        schedule.require_complete_recompute,
        "needs --recompute-granularity full",
        "--recompute-activations --recompute-method uniform",
    ),
    Refusal(schedule.require_offloading_fits, "needs --cpu-offloading-num-layers of at least 1", "--cpu-offloading"),
]
