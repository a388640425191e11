"""Which checkpoint the flags ask for: the newest one that is whole."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.collective import gather_from_all, on_first_rank, rank_and_size
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.manifest import damaged_files, read_manifest, share_of_files
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.catalog import Catalog, find_damage
from megatron.core.dist_checkpointing.strategies.sharded_files import ShardedFilesLoadStrategy
from megatron.training.checkpoint.arguments import apply_checkpoint_args
from megatron.training.checkpoint.hf_settings import hf_directory, take_hf_settings
from megatron.training.checkpoint.paths import (
    checkpoint_exists,
    complete_directory,
    detect_format,
    get_checkpoint_tracker_filename,
    non_persistent_folder,
    read_tracker,
    saved_iterations,
)
from megatron.training.checkpoint.torch_format import read_first_rank
from megatron.training.utils import print_rank_0

FORMATS = ("torch_dist", "safetensors", "torch")
SHARDED_FORMATS = ("torch_dist", "safetensors")


class WrongFormat(CheckpointingException):
    """A checkpoint has a format that the flags do not expect."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that the flags allow, not looked at yet."""

    folder: str
    iteration: int
    release: bool
    weights_only: bool
    """Take nothing but the weights: a release, or a fallback for a run that starts."""


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk."""

    directory: Path
    folder: str
    iteration: int
    release: bool
    weights_only: bool
    format: str

    def __str__(self) -> str:
        kind = "distributed checkpoint" if self.format in SHARDED_FORMATS else "checkpoint"
        if self.release:
            return f"release {kind} from {self.folder}"
        return f"{kind} from {self.folder} at iteration {self.iteration}"


# ---- what there is ----


def candidates(args: argparse.Namespace, load_arg: str = "load") -> list[Candidate]:
    """Checkpoints that the flags allow, the best one first; empty if there are none. Reads names and trackers only.

    That is the one of `--ckpt-step`; or the one that the tracker file names, and those before it in case it is
    damaged. With `--non-persistent-ckpt-type global` the non-persistent ones count too, and come first at the same
    iteration.

    Raises:
        CheckpointingException: a tracker file holds nonsense.
        FileNotFoundError: neither the folder nor `--pretrained-checkpoint` has a checkpoint.
    """
    folder, weights_only = getattr(args, load_arg), bool(args.finetune)
    if hf_directory(folder) is not None:
        return []
    if folder is not None and args.ckpt_step is not None:
        return [Candidate(str(folder), args.ckpt_step, False, weights_only)]
    found = _in_folder(folder, weights_only)
    if load_arg == "load" and folder is not None and args.non_persistent_ckpt_type == "global":
        short_lived = _in_folder(non_persistent_folder(args, folder), weights_only)
        found = sorted([*short_lived, *found], key=lambda c: -c.iteration)
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if found or pretrained is None or hf_directory(pretrained) is not None:
        return found
    if not checkpoint_exists(pretrained):
        raise FileNotFoundError(
            f"neither --{load_arg} ({folder}) nor --pretrained-checkpoint ({pretrained}) holds a checkpoint"
        )
    return _in_folder(pretrained, True)


def _in_folder(folder: str | Path | None, weights_only: bool) -> list[Candidate]:
    if folder is None or not checkpoint_exists(folder):
        return []
    latest, release = read_tracker(get_checkpoint_tracker_filename(folder))
    if release:
        return [Candidate(str(folder), 0, True, True)]
    older = sorted((i for i in saved_iterations(Path(folder)) if i < latest), reverse=True)
    return [Candidate(str(folder), iteration, False, weights_only) for iteration in (latest, *older)]


def hf_source(args: argparse.Namespace, load_arg: str = "load") -> Path | None:
    """The directory of transformers that the flags name, if there is no checkpoint of `candidates`."""
    named = hf_directory(getattr(args, load_arg))
    return named if named is not None else hf_directory(getattr(args, "pretrained_checkpoint", None))


def open_candidate(args: argparse.Namespace, candidate: Candidate) -> Found:
    """The directory and format of a candidate.

    Raises:
        WrongFormat: the flags expect another format.
        CheckpointingException: the directory is missing or holds no complete checkpoint.
    """
    directory = complete_directory(candidate.folder, candidate.iteration, candidate.release)
    on_disk = detect_format(directory)
    require_allowed_format(args, directory, on_disk)
    return Found(directory, candidate.folder, candidate.iteration, candidate.release, candidate.weights_only, on_disk)


# ---- the first that is whole ----


def find_checkpoint(args: argparse.Namespace, load_arg: str = "load") -> Found | None:
    """The newest checkpoint that the flags allow and that is whole; None if there are none. All ranks call this and
    share the reading.

    Says which ones it passes over, and why.

    Raises:
        CheckpointingException: none of them is whole.
    """
    folder = getattr(args, load_arg)
    options = on_first_rank(f"cannot load from {folder}", lambda: candidates(args, load_arg))
    problems: list[str] = []
    for candidate in options:
        found, reason = on_first_rank(f"cannot load from {folder}", lambda c=candidate: _open(args, c))
        if found is not None:
            reason = verify(found, checksums=args.ckpt_verify == "checksums")
            if not reason:
                return found
        problems += reason
        if len(options) > 1:
            print_rank_0(
                f"WARNING: skipping the checkpoint of iteration {candidate.iteration} in {candidate.folder}: "
                + "; ".join(reason)
            )
    if options:
        raise CheckpointingException(f"cannot load from {folder}: " + "\n  ".join(problems))
    return None


def _open(args: argparse.Namespace, candidate: Candidate) -> tuple[Found | None, list[str]]:
    try:
        return open_candidate(args, candidate), []
    except WrongFormat:
        raise
    except CheckpointingException as error:
        return None, [str(error)]


def verify(found: Found, checksums: bool = True) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks; empty if it is whole. All ranks call this.

    Each rank reads its share of the files. A checkpoint without a manifest, of another program, is whole if it has all
    the bytes that its table of contents speaks of.
    """

    def prepare() -> Any:
        try:
            records = read_manifest(found.directory)
            return records if records is not None else structural_damage(found)
        except CheckpointingException as error:
            return [str(error)]

    records = on_first_rank(f"cannot verify {found.directory}", prepare)
    if isinstance(records, list):
        return records
    rank, size = rank_and_size()
    own = damaged_files(found.directory, records, share_of_files(records, rank, size), checksums)
    return sorted(problem for problems in gather_from_all(own) for problem in problems)


def verify_alone(
    found: Found, checksums: bool = True, on_progress: Callable[[int], None] = lambda n: None
) -> list[str]:
    """`verify` by one process."""
    try:
        records = read_manifest(found.directory)
        if records is None:
            return structural_damage(found)
        return damaged_files(found.directory, records, None, checksums, on_progress)
    except CheckpointingException as error:
        return [str(error)]


def structural_damage(found: Found) -> list[str]:
    """What is missing of a checkpoint, as far as can be told without checksums."""
    try:
        common = read_common(found)
        if found.format == "torch":
            return []
        problems = find_damage(read_catalog_of(found.directory).places(), found.directory)
        return problems if common else [f"{found.directory} has an empty common state"]
    except CheckpointingException as error:
        return [str(error)]


def read_catalog_of(directory: Path) -> Catalog:
    """Table of contents of a sharded checkpoint of any format."""
    strategy = get_default_load_sharded_strategy(directory)
    if not isinstance(strategy, ShardedFilesLoadStrategy):
        raise CheckpointingException(f"{directory}: {type(strategy).__name__} has no table of contents")
    return strategy.read_catalog(directory)


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
    raise WrongFormat(
        f"{directory} has format {on_disk}, --ckpt-format is {args.ckpt_format}: "
        f"set --auto-detect-ckpt-format to load it"
    )


def require_known_format(name: str) -> None:
    """Raise for a format that cannot be written or read."""
    if name not in FORMATS:
        raise NotImplementedError(f"--ckpt-format {name} is not available; available formats: {', '.join(FORMATS)}")


# ---- what it says about itself ----


def read_common(found: Found) -> dict[str, Any]:
    """What does not depend on the layout: arguments, counters, schedule."""
    if found.format == "torch":
        return read_first_rank(found.directory)
    return dist_checkpointing.load_common_state_dict(found.directory)


def saved_args(common: dict[str, Any]) -> argparse.Namespace | None:
    """Arguments of the run that wrote the checkpoint, if it says."""
    saved = common.get("args")
    return saved if isinstance(saved, argparse.Namespace) else None


def load_args_from_checkpoint(
    args: argparse.Namespace, load_arg: str = "load", checkpointing_context: Any = None
) -> argparse.Namespace | None:
    """Fill `args` with the model's settings of a checkpoint, before they are checked; returns all that it
    saved.

    Needs no process groups. The format may be any that can be read, as it is one of the settings taken over.
    """
    any_format = argparse.Namespace(**{**vars(args), "auto_detect_ckpt_format": True})
    options = candidates(any_format, load_arg)
    directory = hf_source(args, load_arg)
    if not options and directory is not None:
        take_hf_settings(args, directory)
        return None
    if not options:
        report_missing(args, getattr(args, load_arg))
        return None
    problems: list[str] = []
    for candidate in options:
        found, reason = _open(any_format, candidate)
        if found is not None:
            reason = verify_alone(found, checksums=False)
        if found is not None and not reason:
            return _take_args(args, found)
        problems += reason
    raise CheckpointingException(f"cannot take arguments from {getattr(args, load_arg)}: " + "\n  ".join(problems))


def _take_args(args: argparse.Namespace, found: Found) -> argparse.Namespace:
    saved = saved_args(read_common(found))
    if saved is None:
        raise CheckpointingException(f"{found.directory} does not say which arguments it was made with")
    apply_checkpoint_args(args, saved, path=str(found.directory))
    return saved
