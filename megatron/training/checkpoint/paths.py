"""Where checkpoints lie, which one is the latest, and how a new one takes its place all at once.

A save writes into `iter_0000010.tmp-<token>`, beside the final name. When everything is on the disk the
directory is renamed, and then the tracker file is replaced. Whatever instant a run dies at, the tracker names
a whole checkpoint; directories with `.tmp-` in their name are leftovers, which no load looks at and the next
save removes.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.collective import gather_from_all, together
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.durable import sync_directory

TRACKER_FNAME = "latest_checkpointed_iteration.txt"
MODEL_FNAME = "model_optim_rng.pt"
DISTRIB_OPTIM_FNAME = "distrib_optim.pt"
_UNFINISHED = ".tmp-"
_REPLACED = ".replaced"


# ---- names ----


def get_checkpoint_tracker_filename(checkpoints_path: str | Path) -> str:
    """The file that names the latest checkpoint."""
    return str(Path(checkpoints_path) / TRACKER_FNAME)


def iteration_name(iteration: int, release: bool = False) -> str:
    """Name of a checkpoint's directory."""
    return "release" if release else f"iter_{iteration:07d}"


def rank_directory_name(tensor_rank: int, pipeline_rank: int | None = None, expert_rank: int | None = None) -> str:
    """Directory of one model-parallel rank in the `torch` format; None for an axis of one rank."""
    places = [f"mp_rank_{tensor_rank:02d}"]
    places += [f"{rank:03d}" for rank in (pipeline_rank, expert_rank) if rank is not None]
    return "_".join(places)


@dataclass(frozen=True)
class Place:
    """A place in the model-parallel grid; what is None is this rank's own."""

    tensor_rank: int | None = None
    pipeline_rank: int | None = None
    expert_rank: int | None = None
    pipeline_parallel: bool | None = None
    """Whether names have a pipeline rank; None: if there are several."""
    expert_parallel: bool | None = None

    def directory_name(self) -> str:
        """Directory of this place in the `torch` format."""
        ps = parallel_state
        tensor, pipeline, expert = self.tensor_rank, self.pipeline_rank, self.expert_rank
        with_pipeline, with_expert = self.pipeline_parallel, self.expert_parallel
        if with_pipeline is None:
            with_pipeline = ps.get_pipeline_model_parallel_world_size() > 1
        if with_expert is None:
            with_expert = ps.get_expert_model_parallel_world_size() > 1
        if tensor is None:
            tensor = ps.get_tensor_model_parallel_rank()
        if with_pipeline and pipeline is None:
            pipeline = ps.get_pipeline_model_parallel_rank()
        if with_expert and expert is None:
            expert = ps.get_expert_model_parallel_rank()
        return rank_directory_name(tensor, pipeline if with_pipeline else None, expert if with_expert else None)


OWN_PLACE = Place()


def get_checkpoint_name(
    checkpoints_path: str | Path,
    iteration: int,
    release: bool = False,
    pipeline_parallel: bool | None = None,
    tensor_rank: int | None = None,
    pipeline_rank: int | None = None,
    expert_parallel: bool | None = None,
    expert_rank: int | None = None,
    return_base_dir: bool = False,
    basename: str = MODEL_FNAME,
) -> str:
    """Directory of a checkpoint, or the file of one model-parallel rank in it (default: of this rank)."""
    base = Path(checkpoints_path) / iteration_name(iteration, release)
    if return_base_dir:
        return str(base)
    place = Place(tensor_rank, pipeline_rank, expert_rank, pipeline_parallel, expert_parallel)
    return str(base / place.directory_name() / basename)


def non_persistent_folder(args: argparse.Namespace, folder: str | Path) -> Path:
    """Where checkpoints lie of which only the newest is kept, for a run whose others lie in `folder`."""
    return Path(args.non_persistent_global_ckpt_dir or Path(folder) / "non_persistent")


def find_first_rank_file(directory: Path) -> Path | None:
    """The file of the first model-parallel rank in a `torch` checkpoint; None if there is none."""
    for ranks in ((0,), (0, 0), (0, 0, 0)):
        path = directory / rank_directory_name(*ranks) / MODEL_FNAME
        if path.is_file():
            return path
    return None


# ---- what is there ----


def read_metadata(tracker_filename: str | Path) -> tuple[int, bool]:
    """(iteration, is a release) that a tracker file names: the highest of what the ranks see.

    Raises:
        CheckpointingException: the file holds something else, or is unreadable, on any rank.
    """
    content = (0, False)
    with together(f"cannot read {tracker_filename}"):
        content = read_tracker(tracker_filename)
    return max(gather_from_all(content))


def read_tracker(tracker_filename: str | Path) -> tuple[int, bool]:
    """(iteration, is a release) that a tracker file names, as this rank sees it."""
    text = Path(tracker_filename).read_text(errors="replace").strip()
    if text == "release":
        return 0, True
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text), False
    raise CheckpointingException(
        f"{tracker_filename} must hold an iteration number or the word release, it holds {text[:40]!r}"
    )


def checkpoint_exists(checkpoints_path: str | Path | None) -> bool:
    """Whether a folder has a tracker file."""
    return checkpoints_path is not None and Path(get_checkpoint_tracker_filename(checkpoints_path)).is_file()


def saved_iterations(checkpoints_path: Path) -> list[int]:
    """Iterations of the checkpoints in a folder, in no order."""
    names = (path.name for path in checkpoints_path.glob("iter_*"))
    return [int(name[5:]) for name in names if re.fullmatch(r"iter_[0-9]{7,}", name)]


def complete_directory(checkpoints_path: str | Path, iteration: int, release: bool) -> Path:
    """Directory of a checkpoint that is there, taking into account a save that died while it replaced one.

    Raises:
        CheckpointingException: there is none; the message lists those that are there.
    """
    directory = Path(checkpoints_path) / iteration_name(iteration, release)
    replaced = directory.with_name(directory.name + _REPLACED)
    if directory.is_dir():
        return directory
    if replaced.is_dir():
        return replaced
    there = sorted(saved_iterations(Path(checkpoints_path)))
    raise CheckpointingException(
        f"there is no checkpoint {directory}; iterations in {checkpoints_path}: "
        f"{', '.join(map(str, there)) if there else 'none'}"
    )


def detect_format(directory: Path) -> str:
    """Format of the checkpoint in a directory: torch_dist, safetensors, torch or torch_dcp.

    Raises:
        CheckpointingException: none of them.
    """
    config = maybe_load_config(directory)
    if config is not None:
        return config.sharded_backend
    if any(path.name.startswith("mp_rank_0") for path in directory.iterdir()):
        return "torch"
    if (directory / ".metadata").is_file():
        return "torch_dcp"
    raise CheckpointingException(
        f"{directory} is not a checkpoint: it has neither metadata.json nor mp_rank_00* nor .metadata"
    )


# ---- a new checkpoint; the first rank alone calls these ----


def begin_checkpoint(checkpoints_path: Path, iteration: int) -> Path:
    """An empty directory to write a checkpoint into. Removes what interrupted saves have left."""
    checkpoints_path.mkdir(parents=True, exist_ok=True)
    for leftover in checkpoints_path.glob(f"iter_*{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)  # it may be on its way out already
    for replaced in checkpoints_path.glob(f"iter_*{_REPLACED}"):
        _settle_replacement(replaced)
    directory = unfinished_name(checkpoints_path, iteration)
    directory.mkdir()
    return directory


def unfinished_name(checkpoints_path: Path, iteration: int) -> Path:
    """A new name for a directory that no load looks at and that the next save removes."""
    return checkpoints_path / f"{iteration_name(iteration)}{_UNFINISHED}{secrets.token_hex(4)}"


def _settle_replacement(replaced: Path) -> None:
    """Finish a replacement that died between its two renames."""
    final = replaced.with_name(replaced.name[: -len(_REPLACED)])
    if final.exists():
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, final)


def publish_checkpoint(written: Path, iteration: int) -> Path:
    """Give a completely written directory its final name, then make it the latest checkpoint."""
    final = written.with_name(iteration_name(iteration))
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(written, final)
    sync_directory(final.parent)
    write_tracker(final.parent, iteration)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def write_tracker(checkpoints_path: Path, iteration: int) -> None:
    """Make `iteration` the latest checkpoint; readers see the old name or the new one."""
    tracker = Path(get_checkpoint_tracker_filename(checkpoints_path))
    partial = tracker.with_name(tracker.name + ".partial")
    with open(partial, "w") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, tracker)
    sync_directory(checkpoints_path)


def discard_checkpoint(written: Path) -> None:
    """Remove the directory of a save that failed."""
    shutil.rmtree(written, ignore_errors=True)
