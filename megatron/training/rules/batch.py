"""Rules about batches and about how long a run is."""

from __future__ import annotations

import argparse

from megatron.core.num_microbatches_calculator import build_num_microbatches_calculator
from megatron.training.settings import refuse_unless


def require_micro_batch_size(args: argparse.Namespace) -> None:
    """A forward pass has at least one sample."""
    refuse_unless(
        args.micro_batch_size is not None and args.micro_batch_size > 0,
        f"--micro-batch-size ({args.micro_batch_size}) is required and must be positive",
    )


def derive_global_batch_size(args: argparse.Namespace) -> None:
    """A step has one microbatch per data parallel rank."""
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    refuse_unless(args.global_batch_size > 0, f"--global-batch-size ({args.global_batch_size}) must be positive")


def require_batch_divides_over_ranks(args: argparse.Namespace) -> None:
    """Every data parallel rank runs the same number of whole microbatches."""
    parts = args.micro_batch_size * args.data_parallel_size
    if not args.decrease_batch_size_if_needed:
        refuse_unless(
            args.global_batch_size % parts == 0,
            f"--global-batch-size ({args.global_batch_size}) must be divisible by {parts}, "
            f"--micro-batch-size ({args.micro_batch_size}) x {args.data_parallel_size} data parallel ranks; "
            "or pass --decrease-batch-size-if-needed",
        )
    refuse_unless(
        args.global_batch_size >= parts,
        f"--global-batch-size ({args.global_batch_size}) is less than one microbatch of "
        f"{args.micro_batch_size} on each of {args.data_parallel_size} data parallel ranks",
    )


def require_valid_rampup(args: argparse.Namespace) -> None:
    """The batch grows in equal steps that end at the global batch size, each fit for the ranks."""
    if args.rampup_batch_size is None:
        return
    words = args.rampup_batch_size
    refuse_unless(
        len(words) == 3 and all(str(word).lstrip("-").isdigit() for word in words),
        f"--rampup-batch-size {' '.join(map(str, words))}: three whole numbers are needed, the first batch "
        "size, its increment, and the samples over which it grows",
    )
    start, increment, samples = map(int, words)
    refuse_unless(
        start > 0 and increment > 0 and samples >= 0,
        f"--rampup-batch-size {start} {increment} {samples}: start and increment must be positive, samples "
        "not negative",
    )
    growth, parts = args.global_batch_size - start, args.micro_batch_size * args.data_parallel_size
    refuse_unless(
        growth >= 0 and growth % increment == 0,
        f"--rampup-batch-size {start} {increment} {samples} does not reach --global-batch-size "
        f"{args.global_batch_size} in whole increments",
    )
    fits = start % parts == 0 and (increment % parts == 0 or growth == 0)
    refuse_unless(
        fits or args.decrease_batch_size_if_needed,
        f"--rampup-batch-size {start} {increment} {samples}: start and increment must be divisible by "
        f"{parts}, --micro-batch-size ({args.micro_batch_size}) x {args.data_parallel_size} data parallel "
        "ranks; or pass --decrease-batch-size-if-needed",
    )


BATCH_RULES = (
    require_micro_batch_size,
    derive_global_batch_size,
    require_batch_divides_over_ranks,
    require_valid_rampup,
)


# --- length of the run ----------------------------------------------------------------------------


def note_unit_of_length(args: argparse.Namespace) -> None:
    """A run is measured in steps or in samples; schedules need to know which, after both are known."""
    if not hasattr(args, "train_iters_given"):
        args.train_iters_given = args.train_iters is not None


def require_lengths_in_steps(args: argparse.Namespace) -> None:
    """A run measured in steps gives all its lengths in steps, and its batch does not grow."""
    if not args.train_iters_given:
        return
    reason = f"--train-iters {args.train_iters} measures the run in steps"
    refuse_unless(args.train_samples is None, f"{reason}; it excludes --train-samples ({args.train_samples})")
    refuse_unless(
        args.lr_decay_samples is None,
        f"{reason}; instead of --lr-decay-samples ({args.lr_decay_samples}) use --lr-decay-iters",
    )
    refuse_unless(
        args.lr_warmup_samples == 0,
        f"{reason}; instead of --lr-warmup-samples ({args.lr_warmup_samples}) use --lr-warmup-iters",
    )
    refuse_unless(args.rampup_batch_size is None, f"{reason}; --rampup-batch-size needs --train-samples instead")
    _require_one_warmup(args, "lr_warmup_iters")


def require_lengths_in_samples(args: argparse.Namespace) -> None:
    """A run measured in samples gives all its lengths in samples."""
    if args.train_iters_given or args.train_samples is None:
        return
    reason = f"--train-samples {args.train_samples} measures the run in samples"
    refuse_unless(
        args.lr_decay_iters is None,
        f"{reason}; instead of --lr-decay-iters ({args.lr_decay_iters}) use --lr-decay-samples",
    )
    refuse_unless(
        args.lr_warmup_iters == 0,
        f"{reason}; instead of --lr-warmup-iters ({args.lr_warmup_iters}) use --lr-warmup-samples",
    )
    _require_one_warmup(args, "lr_warmup_samples")


def _require_one_warmup(args: argparse.Namespace, name: str) -> None:
    refuse_unless(
        args.lr_warmup_fraction is None or getattr(args, name) == 0,
        f"--lr-warmup-fraction ({args.lr_warmup_fraction}) and --{name.replace('_', '-')} "
        f"({getattr(args, name)}) exclude each other; give one of them",
    )


def require_positive_length(args: argparse.Namespace) -> None:
    """A run of no steps is asked for by --skip-train."""
    for name in ("train_iters", "train_samples"):
        value = getattr(args, name)
        refuse_unless(
            value is None or value > 0,
            f"--{name.replace('_', '-')} ({value}) must be positive; --skip-train only evaluates",
        )


def derive_train_iters(args: argparse.Namespace) -> None:
    """Steps of a run measured in samples: those of the growing batch, then whole steps of the remainder."""
    if args.train_samples is None or args.train_iters_given:
        return
    iterations, consumed = ramp_up_length(args) if args.rampup_batch_size else (0, 0)
    args.train_iters = iterations + max(args.train_samples - consumed, 0) // args.global_batch_size


def ramp_up_length(args: argparse.Namespace) -> tuple[int, int]:
    """Steps and samples of the phase in which the batch grows."""
    words = [int(word) for word in args.rampup_batch_size]
    growing = build_num_microbatches_calculator(
        args.rank,
        words,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )
    iterations, consumed = 0, 0
    while consumed <= min(words[2], args.train_samples):
        growing.update(consumed, consistency_check=False)
        consumed += growing.get_current_running_global_batch_size()
        iterations += 1
    return iterations, consumed


TRAINING_LENGTH_RULES = (
    note_unit_of_length,
    require_lengths_in_steps,
    require_lengths_in_samples,
    require_positive_length,
    derive_train_iters,
)


def require_training_length(args: argparse.Namespace) -> None:
    """A training program, unlike one that only reads a model, needs a length and a learning rate."""
    refuse_unless(
        args.train_iters is not None or args.train_samples is not None,
        "the length of the run is missing: give --train-iters or --train-samples",
    )
    refuse_unless(args.lr is not None, "--lr, the peak learning rate, is required for training")
    refuse_unless(args.seq_length is not None, "--seq-length, the tokens per sample, is required for training")
