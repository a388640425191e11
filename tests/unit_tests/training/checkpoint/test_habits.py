"""Habits of saving and loading: in the background, for a short while, only so many, from the newest whole one."""

import contextlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.checkpoint.paths import saved_iterations
from megatron.training.checkpoint.retention import outdated
from tests.unit_tests.training.checkpoint.tiny_run import Plan, TinyRun
from tests.worker_pool import run_ranks

FORMATS = ["torch_dist", "safetensors", "torch"]


def save_each(plan: Plan, folder: str, steps: int, changes: dict[str, Any]) -> list[Any]:
    """Train and save after every step; the last results."""
    run = TinyRun(plan)
    results: list[Any] = []
    for _ in range(steps):
        results = run.train(1)
        run.save(folder, **changes)
    run.checkpoints.close()
    return results


def load_quietly(plan: Plan, folder: str, changes: dict[str, Any]) -> tuple[int, str, str]:
    """(iteration, output, error) of a load."""
    run = TinyRun(plan, seed=1000)
    error = ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            run.load(folder, **changes)
        except CheckpointingException as failure:
            error = str(failure)
    return run.state.iteration, out.getvalue(), error


# ---- in the background ----


def train_while_saving(plan: Plan, folder: str, changes: dict[str, Any]) -> None:
    run = TinyRun(plan)
    run.train(1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run.save(folder, async_save=True, **changes)
        expected = run.train(2)
        run.checkpoints.finish(blocking=True)
    if torch.distributed.get_rank() == 0:
        lines = out.getvalue().splitlines()
        assert "  scheduled an async checkpoint save at iteration       1 to " + folder in lines
        assert lines[-1].startswith("  successfully saved checkpoint from iteration       1 to " + folder)
    run.save(folder, async_save=True, **changes)  # the second one goes into the memory of the first
    run.checkpoints.close()
    again = TinyRun(plan, seed=1000)
    again.load(folder, ckpt_step=1)
    assert again.train(2) == expected
    for name, weight in again.weights().items():
        assert torch.equal(weight, run.weights()[name]), name
    assert sorted(saved_iterations(Path(folder))) == [1, 3]


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (Plan(tp=2, dp=2, dist_opt=True), {"use_persistent_ckpt_worker": True}),
        (Plan(dp=2, format="safetensors"), {"async_strategy": "thread"}),
        (Plan(pp=2, dtype=torch.bfloat16), {"ckpt_assume_constant_structure": True}),
    ],
    ids=str,
)
def test_training_goes_on_while_the_state_is_written(tmp_path: Path, plan: Plan, changes: dict[str, Any]) -> None:
    run_ranks(plan.size, train_while_saving, plan, str(tmp_path), changes)


def save_onto_nothing(folder: str) -> tuple[str, list[str]]:
    run = TinyRun(Plan(tp=2))
    run.train(1)
    run.save(folder, async_save=True)
    run.checkpoints.finish(blocking=True)
    run.train(1)
    run.save(folder, async_save=True)
    directory = run.checkpoints.under_way
    assert directory is not None
    if torch.distributed.get_rank() == 1:  # as if the disk were full: this rank's file is gone
        call = run.checkpoints.queue._calls[0]
        call.thread.join()
        call.failure = OSError(28, "No space left on device")
    message = ""
    try:
        run.checkpoints.finish(blocking=True)
    except CheckpointingException as error:
        message = str(error)
    torch.distributed.barrier()
    names = sorted(path.name for path in Path(folder).iterdir())
    torch.distributed.barrier()
    run.save(folder)  # another save can follow
    return message, names


def test_a_failure_in_the_background_surfaces_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    for message, names in run_ranks(2, save_onto_nothing, str(tmp_path)):
        assert "No space left on device (rank 1)" in message
        assert names == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


# ---- what is kept ----


def test_which_checkpoints_are_outdated() -> None:
    every_ten = list(range(10, 101, 10))
    assert outdated(every_ten, 100, 1, None) == every_ten[:-1]
    assert outdated(every_ten, 100, 3, None) == every_ten[:-3]
    assert outdated(every_ten, 100, 1, 40) == [10, 20, 30, 50, 60, 70, 90]
    assert outdated(every_ten, 100, 2, 40) == [10, 20, 30, 50, 60, 70]
    assert outdated([10, 20, 200], 20, 1, None) == [10], "what another run saved later is not touched"
    assert outdated([], 10, 1, None) == []


@pytest.mark.parametrize("format", FORMATS)
def test_old_checkpoints_are_removed(tmp_path: Path, format: str) -> None:
    changes = {"save_keep_last": 2, "save_retain_interval": 3}
    run_ranks(1, save_each, Plan(format=format), str(tmp_path), 7, changes)
    assert sorted(saved_iterations(tmp_path)) == [3, 6, 7]
    deadline = time.monotonic() + 300
    while (left := list(tmp_path.glob("*.tmp-*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


# ---- for a short while ----


def save_in_between(folder: str, elsewhere: str | None) -> None:
    run = TinyRun(Plan())
    place = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": elsewhere}
    run.train(1)
    run.save(folder, **place)
    for _ in range(3):
        run.train(1)
        run.save(folder, non_persistent=True, **place)
    other = TinyRun(Plan(), seed=1)
    other.load(folder, **place)
    assert other.state.iteration == 4
    other.load(folder)
    assert other.state.iteration == 1, "without the flag they do not count"
    run.train(1)
    run.save(folder, **place)
    other.load(folder, **place)
    assert other.state.iteration == 5, "the newer persistent one wins"


@pytest.mark.parametrize("elsewhere", [None, "other"])
def test_non_persistent_checkpoints_replace_each_other(tmp_path: Path, elsewhere: str | None) -> None:
    folder = tmp_path / "saved"
    place = tmp_path / elsewhere if elsewhere else folder / "non_persistent"
    run_ranks(1, save_in_between, str(folder), str(place) if elsewhere else None)
    assert saved_iterations(place) == [4] and sorted(saved_iterations(folder)) == [1, 5]


# ---- the newest that is whole ----


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("format", FORMATS)
def test_the_newest_whole_checkpoint_is_loaded_and_others_are_named(tmp_path: Path, format: str) -> None:
    plan = Plan(tp=2, format=format, layers=2)
    run_ranks(2, save_each, plan, str(tmp_path), 4, {})
    flip(largest_file(tmp_path / "iter_0000004"))
    largest_file(tmp_path / "iter_0000003").unlink()
    for iteration, out, error in run_ranks(2, load_quietly, plan, str(tmp_path), {}):
        assert iteration == 2 and error == ""
        if out:
            assert "skipping the checkpoint of iteration 4" in out and "checksum" in out
            assert "skipping the checkpoint of iteration 3" in out and "is missing" in out
    _, _, error = run_ranks(2, load_quietly, plan, str(tmp_path), {"ckpt_step": 4})[0]
    assert "iter_0000004" in error and "is damaged" in error
    sizes = {"ckpt_verify": "sizes"}
    assert run_ranks(2, load_quietly, plan, str(tmp_path), sizes)[0][0] in (4, 0), "a flipped bit keeps the size"
    for iteration in (1, 2):
        flip(largest_file(tmp_path / f"iter_{iteration:07d}"))
    _, _, error = run_ranks(2, load_quietly, plan, str(tmp_path), {})[1]
    assert error.startswith(f"cannot load from {tmp_path}") and error.count("checksum") == 3


def test_every_damaged_file_is_noticed(tmp_path: Path) -> None:
    run_ranks(1, save_each, Plan(layers=1, format="torch_dist"), str(tmp_path), 2, {})
    newest = tmp_path / "iter_0000002"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        flip(path)
        ((iteration, out, error),) = run_ranks(1, load_quietly, Plan(layers=1), str(tmp_path), {})
        path.write_bytes(content)
        harmless = path.name == "metadata.json" and iteration == 2  # a letter of a number that nobody reads
        assert error == "" and (iteration == 1 and "skipping" in out or harmless), path.name
    assert run_ranks(1, load_quietly, Plan(layers=1), str(tmp_path), {})[0][0] == 2


def test_checkpoints_without_a_manifest_are_checked_by_their_table_of_contents(tmp_path: Path) -> None:
    run_ranks(1, save_each, Plan(layers=1), str(tmp_path), 2, {})
    newest = tmp_path / "iter_0000002"
    (newest / "manifest.json").unlink()
    assert run_ranks(1, load_quietly, Plan(layers=1), str(tmp_path), {})[0][0] == 2
    data = largest_file(newest)
    os.truncate(data, data.stat().st_size - 1)
    ((iteration, out, _),) = run_ranks(1, load_quietly, Plan(layers=1), str(tmp_path), {})
    assert iteration == 1 and "is truncated" in out


def test_a_manifest_belongs_to_every_format(tmp_path: Path) -> None:
    for format in FORMATS:
        plan = Plan(tp=2, dist_opt=True, format=format, layers=2)
        run_ranks(2, save_each, plan, str(tmp_path / format), 1, {})
        directory = tmp_path / format / "iter_0000001"
        listed = set(json.loads((directory / "manifest.json").read_text())["files"])
        there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        assert listed == there - {"manifest.json", "metadata.json"}


# ---- a data iterator with a state of its own ----


class Loader:
    """Counts; says and takes back where it stands."""

    def __init__(self, start: int) -> None:
        self.at = start

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Wrapper:
    """As iterators that hide the loader."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable


def save_position(plan: Plan, folder: str) -> None:
    from megatron.core import parallel_state
    from megatron.training.checkpoint.data import restore_position

    run = TinyRun(plan)
    run.train(1)
    replica = parallel_state.get_data_parallel_rank()
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    run.save(folder, data_iterator=Wrapper(Loader(10 + replica)) if reads else None)
    run.load(folder)
    loader = Loader(0)
    if reads:
        assert restore_position(Wrapper(loader), run.state.data_position) and loader.at == 10 + replica
    run.save(folder)
    run.load(folder)
    assert run.state.data_position is None and not restore_position(loader, None)


@pytest.mark.parametrize("format", FORMATS)
def test_the_position_of_a_data_iterator_is_kept(tmp_path: Path, format: str) -> None:
    run_ranks(4, save_position, Plan(tp=2, dp=2, format=format), str(tmp_path))


# ---- the public names ----


def use_public_names(folder: str) -> None:
    from dataclasses import replace

    from megatron.training import global_vars
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    plan = Plan(dist_opt=True, dp=2)
    run = TinyRun(plan)
    run.train(2)
    global_vars.set_args(plan.arguments(folder, async_save=True))
    global_vars.set_train_state(replace(run.state, iteration=0))
    context: dict[str, Any] = {}
    save_checkpoint(2, run.model, run.optimizer, run.scheduler, 7.0, context)
    context["context"].close()
    other = TinyRun(plan, seed=1)
    assert load_checkpoint(other.model, other.optimizer, other.scheduler) == (2, 7.0)
    assert global_vars.get_train_state() == replace(run.state, num_floating_point_operations_so_far=7.0)
    for name, weight in other.weights().items():
        assert torch.equal(weight, run.weights()[name]), name
    untouched = TinyRun(plan, seed=2)
    load_checkpoint(untouched.model, untouched.optimizer, untouched.scheduler, skip_load_to_model_and_opt=True)
    assert untouched.optimizer.state_dict()["optimizer"]["param_groups"][0]["step"] == 0
    with pytest.raises(ValueError, match="only torch takes another place"):
        save_checkpoint(2, run.model, None, None, 0.0, context, tensor_rank=1)
    global_vars.destroy_global_vars()


def test_public_names_save_and_load(tmp_path: Path) -> None:
    run_ranks(2, use_public_names, str(tmp_path))
