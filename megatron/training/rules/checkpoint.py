"""Rules about what is saved, loaded and taken over from checkpoints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export import NotExpressible, family_of_settings
from megatron.core.export.hf_folder import require_free_or_hf
from megatron.training.settings import ConfigurationError, refuse_unless, warn

# --- before arguments are taken from a checkpoint -------------------------------------------------


def require_conversion_paths(args: argparse.Namespace) -> None:
    """A conversion reads one folder and writes another; without a checkpoint there is nothing to convert."""
    if args.ckpt_convert_format is not None:
        refuse_unless(
            args.ckpt_convert_save and args.load,
            f"--ckpt-convert-format {args.ckpt_convert_format} needs --load (what to convert) and "
            "--ckpt-convert-save (where to write it)",
        )
        target = Path(args.ckpt_convert_save) / args.ckpt_convert_format
        same = [name for name in ("load", "save") if getattr(args, name) and Path(getattr(args, name)) == target]
        refuse_unless(
            not same, f"--ckpt-convert-save would write into {target}, which is --{' and --'.join(same)} of this run"
        )
        args.exit_on_missing_checkpoint = True
    elif args.ckpt_convert_save is not None:
        warn(args, f"--ckpt-convert-save {args.ckpt_convert_save} has no effect without --ckpt-convert-format")


def require_load_for_checkpoint_args(args: argparse.Namespace) -> None:
    """Arguments can be taken only from a checkpoint that every rank reads alike."""
    if args.use_checkpoint_args:
        refuse_unless(args.load, "--use-checkpoint-args needs --load, the folder of the checkpoint")
        refuse_unless(
            args.non_persistent_ckpt_type not in ("local", "in_memory"),
            f"--use-checkpoint-args does not work with --non-persistent-ckpt-type {args.non_persistent_ckpt_type}",
        )


CHECKPOINT_SOURCE_RULES = (require_conversion_paths, require_load_for_checkpoint_args)


# --- formats and folders --------------------------------------------------------------------------


def require_place_of_local_checkpoints(args: argparse.Namespace) -> None:
    """Checkpoints on the nodes' own disks need a folder there; those in memory lie in a file system in memory."""
    kind = args.non_persistent_ckpt_type
    if kind == "local":
        refuse_unless(
            args.non_persistent_local_ckpt_dir,
            "--non-persistent-ckpt-type local needs --non-persistent-local-ckpt-dir",
        )
    if kind == "in_memory":
        refuse_unless(
            os.path.isdir("/dev/shm"),
            "--non-persistent-ckpt-type in_memory needs /dev/shm; use local with a folder on the node",
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
            args.use_dist_ckpt and args.ckpt_convert_format != "torch",
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
    """Only sharded formats can be written in the background."""
    if args.async_save:
        refuse_unless(
            args.ckpt_format in ("torch_dist", "safetensors"),
            f"--async-save needs --ckpt-format torch_dist or safetensors, found {args.ckpt_format}",
        )


def require_known_retention(args: argparse.Namespace) -> None:
    """What is to be kept must be among what is saved."""
    every, last = args.save_retain_interval, args.save_keep_last
    refuse_unless(last is None or last >= 1, f"--save-keep-last ({last}) must keep at least one checkpoint")
    if every is not None:
        refuse_unless(
            args.save_interval and every > 0 and every % args.save_interval == 0,
            f"--save-retain-interval ({every}) must be a multiple of --save-interval ({args.save_interval})",
        )


def require_non_persistent_place(args: argparse.Namespace) -> None:
    """Steps between short-lived checkpoints say nothing without a place for them, nor a place without steps."""
    interval, kind = args.non_persistent_save_interval, args.non_persistent_ckpt_type
    if interval is not None:
        refuse_unless(
            kind is not None and args.save and interval > 0,
            f"--non-persistent-save-interval {interval} needs --non-persistent-ckpt-type and --save",
        )


def require_replication_fits(args: argparse.Namespace) -> None:
    """Copies are made of checkpoints on the nodes' disks, a number of ranks apart."""
    if args.replication:
        refuse_unless(args.replication_jump is not None, "--replication needs --replication-jump")
        refuse_unless(
            args.non_persistent_ckpt_type in ("local", "in_memory"),
            f"--replication needs --non-persistent-ckpt-type local or in_memory, found {args.non_persistent_ckpt_type}",
        )
        jump, factor = args.replication_jump, args.replication_factor
        refuse_unless(
            jump >= 1 and factor >= 2 and args.world_size % (jump * factor) == 0,
            f"--replication-jump ({jump}) times --replication-factor ({factor}, at least 2) must divide the "
            f"{args.world_size} ranks",
        )
    elif args.replication_jump is not None:
        warn(args, f"--replication-jump ({args.replication_jump}) has no effect without --replication")
        args.replication_jump = None


def prepare_upcycling(args: argparse.Namespace) -> None:
    """Experts made from a dense checkpoint have no optimizer state of their own, and must be saved."""
    if args.moe_use_upcycling:
        refuse_unless(args.save, "--moe-use-upcycling needs --save")
        source = args.load or args.pretrained_checkpoint
        refuse_unless(source, "--moe-use-upcycling needs --load with a dense checkpoint")
        args.no_load_optim = args.no_load_rng = True


CHECKPOINT_RULES = (
    require_place_of_local_checkpoints,
    derive_use_dist_ckpt,
    require_fsdp_for_torch_dcp,
    require_save_interval,
    require_dist_format_without_gloo,
    warn_of_unshared_save,
    require_dist_format_for_async_save,
    require_known_retention,
    require_non_persistent_place,
    require_replication_fits,
    prepare_upcycling,
)


# --- after the model is settled ---------------------------------------------------------------------


def require_expressible(args: argparse.Namespace) -> None:
    """`--save-hf` needs a class of transformers that computes the same, and a free directory."""
    if args.save_hf is None:
        if args.hf_model_type is not None:
            raise ConfigurationError(f"--hf-model-type {args.hf_model_type} has no effect without --save-hf")
        return
    try:
        require_free_or_hf(args.save_hf)
        family_of_settings(vars(args), args.hf_model_type)
    except (CheckpointingException, NotExpressible) as error:
        raise ConfigurationError(f"--save-hf {args.save_hf}: {error}") from error


CHECKPOINT_EXPORT_RULES = (require_expressible,)
