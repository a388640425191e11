"""Which checkpoint the flags ask for, and what it says about itself before anything is loaded."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.checkpoint_arguments import apply_checkpoint_args
from megatron.training.checkpoint_paths import (
    checkpoint_exists,
    complete_directory,
    detect_format,
    get_checkpoint_tracker_filename,
    read_tracker,
)
from megatron.training.checkpoint_torch import read_first_rank
from megatron.training.utils import print_rank_0

FORMATS = ("torch_dist", "torch")


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk."""

    directory: Path
    folder: str
    iteration: int
    release: bool
    weights_only: bool
    """Take nothing but the weights: a release, or a fallback for a run that starts."""
    format: str

    def __str__(self) -> str:
        kind = "distributed checkpoint" if self.format == "torch_dist" else "checkpoint"
        if self.release:
            return f"release {kind} from {self.folder}"
        return f"{kind} from {self.folder} at iteration {self.iteration}"


def find_checkpoint(args: argparse.Namespace, load_arg: str = "load") -> Found | None:
    """The checkpoint that the flags ask for, as this rank sees it; None if there is none.

    Raises:
        CheckpointingException: what the flags name is not a checkpoint of a format that they allow.
        FileNotFoundError: neither the folder nor `--pretrained-checkpoint` has one.
    """
    folder, weights_only = getattr(args, load_arg), bool(args.finetune)
    pretrained = getattr(args, "pretrained_checkpoint", None)
    has_own = folder is not None and (checkpoint_exists(folder) or args.ckpt_step is not None)
    if not has_own and pretrained is not None:
        if not checkpoint_exists(pretrained):
            raise FileNotFoundError(
                f"neither --{load_arg} ({folder}) nor --pretrained-checkpoint ({pretrained}) holds a checkpoint"
            )
        folder, weights_only, has_own = pretrained, True, True
    if not has_own:
        return None
    iteration, release = args.ckpt_step, False
    if iteration is None or weights_only and folder == pretrained:
        iteration, release = read_tracker(get_checkpoint_tracker_filename(folder))
    directory = complete_directory(folder, iteration, release)
    on_disk = detect_format(directory)
    require_allowed_format(args, directory, on_disk)
    return Found(directory, str(folder), iteration, release, weights_only or release, on_disk)


def report_missing(args: argparse.Namespace, folder: str) -> None:
    """Say that there is no checkpoint; stop if that is not acceptable."""
    print_rank_0(f"WARNING: could not find the metadata file {get_checkpoint_tracker_filename(folder)}")
    if args.exit_on_missing_checkpoint:
        print_rank_0(">> '--exit-on-missing-checkpoint' set ... exiting. <<")
        sys.exit(1)
    print_rank_0("    will not load any checkpoints and will start from random")


def require_allowed_format(args: argparse.Namespace, directory: Path, on_disk: str) -> None:
    """Raise unless the format is the expected one, or any is accepted."""
    if on_disk == args.ckpt_format or args.auto_detect_ckpt_format and on_disk in FORMATS:
        return
    require_known_format(on_disk)
    raise CheckpointingException(
        f"{directory} has format {on_disk}, --ckpt-format is {args.ckpt_format}: "
        f"set --auto-detect-ckpt-format to load it"
    )


def require_known_format(name: str) -> None:
    """Raise for a format that cannot be written or read."""
    if name not in FORMATS:
        raise NotImplementedError(f"--ckpt-format {name} is not available; available formats: {', '.join(FORMATS)}")


def read_common(found: Found) -> dict[str, Any]:
    """What does not depend on the layout: arguments, counters, schedule."""
    if found.format == "torch":
        return read_first_rank(found.directory)
    return dist_checkpointing.load_common_state_dict(found.directory)


def saved_args(common: dict[str, Any]) -> argparse.Namespace | None:
    """Arguments of the run that wrote the checkpoint, if it says."""
    saved = common.get("args")
    return saved if isinstance(saved, argparse.Namespace) else None


def load_args_from_checkpoint(args: argparse.Namespace, load_arg: str = "load") -> argparse.Namespace | None:
    """Fill `args` with the model's settings of a checkpoint, before they are checked; returns all that it
    saved.

    Needs no process groups. The format may be any that can be read, as it is one of the settings taken over.
    """
    any_format = argparse.Namespace(**{**vars(args), "auto_detect_ckpt_format": True})
    found = find_checkpoint(any_format, load_arg)
    if found is None:
        report_missing(args, getattr(args, load_arg))
        return None
    saved = saved_args(read_common(found))
    if saved is None:
        raise CheckpointingException(f"{found.directory} does not say which arguments it was made with")
    apply_checkpoint_args(args, saved, path=str(found.directory))
    return saved
