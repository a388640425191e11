"""Where checkpoints lie, which one is the latest, and how a new one takes its place all at once.

A save writes into `iter_0000010.tmp-<token>`, beside the final name. When everything is on the disk the
directory is renamed, and then the tracker file is replaced. Whatever instant a run dies at, the tracker names
a whole checkpoint; directories with `.tmp-` in their name are leftovers, which no load looks at and the next
save removes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.collective import gather_from_all, together
from megatron.core.dist_checkpointing.core import CheckpointingException
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
    ps = parallel_state
    if pipeline_parallel is None:
        pipeline_parallel = ps.get_pipeline_model_parallel_world_size() > 1
    if expert_parallel is None:
        expert_parallel = ps.get_expert_model_parallel_world_size() > 1
    if tensor_rank is None:
        tensor_rank = ps.get_tensor_model_parallel_rank()
    if pipeline_parallel and pipeline_rank is None:
        pipeline_rank = ps.get_pipeline_model_parallel_rank()
    if expert_parallel and expert_rank is None:
        expert_rank = ps.get_expert_model_parallel_rank()
    directory = rank_directory_name(
        tensor_rank, pipeline_rank if pipeline_parallel else None, expert_rank if expert_parallel else None
    )
    return str(base / directory / basename)


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
    there = sorted(int(path.name[5:]) for path in Path(checkpoints_path).glob("iter_" + "[0-9]" * 7))
    raise CheckpointingException(
        f"there is no checkpoint {directory}; iterations in {checkpoints_path}: "
        f"{', '.join(map(str, there)) if there else 'none'}"
    )


def detect_format(directory: Path) -> str:
    """Format of the checkpoint in a directory: torch_dist, torch or torch_dcp.

    Raises:
        CheckpointingException: none of them.
    """
    if check_is_distributed_checkpoint(directory):
        return "torch_dist"
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
        shutil.rmtree(leftover)
    for replaced in checkpoints_path.glob(f"iter_*{_REPLACED}"):
        _settle_replacement(replaced)
    name = f"{iteration_name(iteration)}{_UNFINISHED}{secrets.token_hex(4)}"
    directory = checkpoints_path / name
    directory.mkdir()
    return directory


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


def sync_tree(directory: Path) -> None:
    """Bring all files under a directory to the disk."""
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
