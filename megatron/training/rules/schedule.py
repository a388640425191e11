"""Rules about learning rate, weight decay and recompute settings."""

from __future__ import annotations

import argparse

from megatron.training.config.flags import all_flags
from megatron.training.settings import refuse_unless, warn


def derive_decay_length(args: argparse.Namespace) -> None:
    """The learning rate decays over the whole run."""
    if args.train_iters_given and args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    if args.train_samples is not None and args.lr_decay_samples is None:
        args.lr_decay_samples = args.train_samples


def require_ordered_learning_rates(args: argparse.Namespace) -> None:
    """The rate starts at or below its peak, and ends at or below it."""
    refuse_unless(args.min_lr >= 0, f"--min-lr ({args.min_lr}) must not be negative")
    if args.lr is None:
        return
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(args, name)
        refuse_unless(value <= args.lr, f"--{name.replace('_', '-')} ({value}) must not exceed --lr ({args.lr})")
    if args.decoupled_lr is not None and args.decoupled_min_lr is not None:
        refuse_unless(
            args.decoupled_min_lr <= args.decoupled_lr,
            f"--decoupled-min-lr ({args.decoupled_min_lr}) must not exceed --decoupled-lr ({args.decoupled_lr})",
        )


def require_warmup_within_decay(args: argparse.Namespace) -> None:
    """The warmup ends before the decay does."""
    fraction = args.lr_warmup_fraction
    refuse_unless(
        fraction is None or 0 <= fraction < 1,
        f"--lr-warmup-fraction ({fraction}) must be at least 0 and below 1",
    )
    for unit in ("iters", "samples"):
        warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
        if decay is not None:
            refuse_unless(decay > 0, f"--lr-decay-{unit} ({decay}) must be positive")
            refuse_unless(
                warmup < decay,
                f"--lr-warmup-{unit} ({warmup}) must be below --lr-decay-{unit} ({decay}), which by default "
                "is the length of the run",
            )


def require_length_of_last_decay(args: argparse.Namespace) -> None:
    """A warmup-stable-decay schedule says how long its last part is."""
    if args.lr_decay_style == "WSD" and (args.train_iters_given or args.train_samples is not None):
        unit = "iters" if args.train_iters_given else "samples"
        refuse_unless(
            getattr(args, f"lr_wsd_decay_{unit}") is not None,
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its last part",
        )


def derive_weight_decay(args: argparse.Namespace) -> None:
    """Constant weight decay has one value; a changing one says where it starts and ends."""
    start, end, style = args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style
    if style == "constant":
        for name, value in (("--start-weight-decay", start), ("--end-weight-decay", end)):
            refuse_unless(
                value is None or value == args.weight_decay,
                f"{name} ({value}) needs --weight-decay-incr-style linear or cosine",
            )
        args.start_weight_decay = args.end_weight_decay = args.weight_decay
    else:
        refuse_unless(
            start is not None and end is not None,
            f"--weight-decay-incr-style {style} needs --start-weight-decay ({start}) and --end-weight-decay ({end})",
        )
    refuse_unless(
        0 <= args.start_weight_decay <= args.end_weight_decay,
        f"weight decay must rise from at least 0, found --start-weight-decay {args.start_weight_decay} and "
        f"--end-weight-decay {args.end_weight_decay}",
    )


def require_one_source_of_schedule(args: argparse.Namespace) -> None:
    """On resuming, either the flags or the checkpoint give the schedule."""
    refuse_unless(
        not (args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler),
        "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other",
    )


def require_complete_recompute(args: argparse.Namespace) -> None:
    """Full recompute says which layers; what tensor parallel ranks hold in common can be split over them."""
    if args.distribute_saved_activations:
        refuse_unless(
            args.tensor_model_parallel_size > 1
            and args.recompute_granularity == "full"
            and args.recompute_method is not None,
            "--distribute-saved-activations needs --tensor-model-parallel-size above 1, "
            "--recompute-granularity full and a --recompute-method",
        )
    if args.recompute_granularity == "selective":
        refuse_unless(
            args.recompute_method is None,
            f"--recompute-method {args.recompute_method} needs --recompute-granularity full, found selective",
        )


def require_offloading_fits(args: argparse.Namespace) -> None:
    """Weights can be away between forward and backward only where each has memory of its own."""
    parts = ("num_layers", "activations", "weights")
    flags = [all_flags()[f"cpu_offloading_{part}"] for part in parts]
    if not args.cpu_offloading:
        given = [flag.names[0] for flag in flags if getattr(args, flag.dest) != flag.default]
        if given:
            warn(args, f"{' '.join(given)} has no effect without --cpu-offloading")
        return
    refuse_unless(
        args.cpu_offloading_num_layers > 0,
        "--cpu-offloading needs --cpu-offloading-num-layers of at least 1 (and below --num-layers)",
    )
    for name in ("use_distributed_optimizer", "use_torch_fsdp2", "use_custom_fsdp"):
        refuse_unless(
            not (args.cpu_offloading_weights and getattr(args, name)),
            f"--cpu-offloading-weights does not work with --{name.replace('_', '-')}, which keeps weights in buffers "
            "of its own; leave it out (activations can be offloaded)",
        )


SCHEDULE_RULES = (
    derive_decay_length,
    require_ordered_learning_rates,
    require_warmup_within_decay,
    require_length_of_last_decay,
    derive_weight_decay,
    require_one_source_of_schedule,
    require_complete_recompute,
    require_offloading_fits,
)
