"""Rules about what is saved, loaded and taken over from checkpoints."""

from __future__ import annotations

import argparse
import importlib.util

from megatron.training.settings import refuse_unless, warn

# --- before arguments are taken from a checkpoint -------------------------------------------------


def require_conversion_paths(args: argparse.Namespace) -> None:
    """A conversion reads one folder and writes another; without a checkpoint there is nothing to convert."""
    if args.ckpt_convert_format is not None:
        refuse_unless(
            args.ckpt_convert_save and args.load,
            f"--ckpt-convert-format {args.ckpt_convert_format} needs --load (what to convert) and "
            "--ckpt-convert-save (where to write it)",
        )
        args.exit_on_missing_checkpoint = True


def require_load_for_checkpoint_args(args: argparse.Namespace) -> None:
    """Arguments can be taken only from a checkpoint that every rank reads alike."""
    if args.use_checkpoint_args:
        refuse_unless(args.load, "--use-checkpoint-args needs --load, the folder of the checkpoint")
        refuse_unless(
            args.non_persistent_ckpt_type != "local",
            "--use-checkpoint-args does not work with --non-persistent-ckpt-type local",
        )


CHECKPOINT_SOURCE_RULES = (require_conversion_paths, require_load_for_checkpoint_args)


# --- formats and folders --------------------------------------------------------------------------


def require_known_non_persistent_type(args: argparse.Namespace) -> None:
    """Short-lived checkpoints lie in a shared folder or on the nodes' disks; the latter need a package."""
    kind = args.non_persistent_ckpt_type
    refuse_unless(
        kind in ("global", "local", None),
        f"--non-persistent-ckpt-type {kind} does not exist; use global or local",
    )
    if kind == "local":
        refuse_unless(
            importlib.util.find_spec("nvidia_resiliency_ext"),
            "--non-persistent-ckpt-type local needs the package nvidia_resiliency_ext",
        )
        refuse_unless(
            args.non_persistent_local_ckpt_dir,
            "--non-persistent-ckpt-type local needs --non-persistent-local-ckpt-dir",
        )


def derive_use_dist_ckpt(args: argparse.Namespace) -> None:
    """Every format but `torch` is sharded."""
    args.use_dist_ckpt = args.ckpt_format != "torch"


def require_fsdp_for_torch_dcp(args: argparse.Namespace) -> None:
    """torch_dcp stores what torch's FSDP2 shards, so nothing else may shard."""
    if args.ckpt_format == "torch_dcp":
        refuse_unless(
            args.use_torch_fsdp2 and args.tensor_model_parallel_size <= 1 and args.pipeline_model_parallel_size <= 1,
            "--ckpt-format torch_dcp needs --use-torch-fsdp2, --tensor-model-parallel-size 1 and "
            "--pipeline-model-parallel-size 1; --ckpt-format torch_dist works with every layout",
        )


def require_save_interval(args: argparse.Namespace) -> None:
    """With a folder to save to, it must be known how often."""
    if args.save:
        refuse_unless(args.save_interval, f"--save {args.save} needs --save-interval, the steps between checkpoints")


def require_dist_format_without_gloo(args: argparse.Namespace) -> None:
    """The `torch` format collects the sharded optimizer in host memory, over gloo."""
    if args.use_distributed_optimizer and not args.enable_gloo_process_groups:
        refuse_unless(
            args.use_dist_ckpt,
            "--disable-gloo-process-groups with --use-distributed-optimizer needs --ckpt-format torch_dist",
        )


def warn_of_unshared_save(args: argparse.Namespace) -> None:
    """An optimizer that each rank saves for itself can be loaded into the same layout only."""
    if args.use_dist_ckpt and args.use_distributed_optimizer and not args.ckpt_fully_parallel_save:
        warn(
            args,
            "--no-ckpt-fully-parallel-save with --use-distributed-optimizer: the saved optimizer cannot be "
            "loaded into another layout",
        )


def require_dist_format_for_async_save(args: argparse.Namespace) -> None:
    """Only torch_dist can be written in the background."""
    if args.async_save:
        refuse_unless(
            args.ckpt_format == "torch_dist",
            f"--async-save needs --ckpt-format torch_dist, found {args.ckpt_format}",
        )


def require_replication_fits(args: argparse.Namespace) -> None:
    """Copies are made of checkpoints on the nodes' disks, a number of ranks apart."""
    if args.replication:
        refuse_unless(args.replication_jump is not None, "--replication needs --replication-jump")
        refuse_unless(args.non_persistent_ckpt_type == "local", "--replication needs --non-persistent-ckpt-type local")
    elif args.replication_jump is not None:
        warn(args, f"--replication-jump ({args.replication_jump}) has no effect without --replication")
        args.replication_jump = None


def prepare_upcycling(args: argparse.Namespace) -> None:
    """Experts made from a dense checkpoint have no optimizer state of their own, and must be saved."""
    if args.moe_use_upcycling:
        refuse_unless(args.save, "--moe-use-upcycling needs --save")
        args.no_load_optim = args.no_load_rng = True


CHECKPOINT_RULES = (
    require_known_non_persistent_type,
    derive_use_dist_ckpt,
    require_fsdp_for_torch_dcp,
    require_save_interval,
    require_dist_format_without_gloo,
    warn_of_unshared_save,
    require_dist_format_for_async_save,
    require_replication_fits,
    prepare_upcycling,
)
