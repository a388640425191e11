"""Files that are damaged, incomplete, foreign or hostile."""

import argparse
import enum
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.collective import describe
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.safe_load import is_stub, safe_torch_load
from tests.worker_pool import run_ranks


def shard(key: str, numel: int = 1000) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.arange(float(numel)))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    state = {"a": shard("a"), "b": shard("b"), "o": ShardedObject("o", {"x": 1}, (1,), (0,)), "n": 3}
    dist_checkpointing.save(state, directory)
    return directory


def request() -> dict:
    empty = {key: ShardedTensor.from_rank_offsets(key, torch.full((1000,), -1.0)) for key in ("a", "b")}
    return {**empty, "o": ShardedObject("o", None, (1,), (0,))}


# ---- hostile files ----


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path, call: str) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple:
        return {
            "os.system": (os.system, (f"touch {self.path}",)),
            "eval": (eval, (f"open({str(self.path)!r}, 'w')",)),
            "exec": (exec, (f"open({str(self.path)!r}, 'w')",)),
            "Path.touch": (Path.touch, (self.path,)),
            "open": (open, (str(self.path), "w")),
            "getattr": (getattr, (Path, "touch")),
            "torch.save": (torch.save, (1, str(self.path))),
            "torch.load": (torch.load, (str(self.path), None)),
        }[self.call]


CALLS = ["os.system", "eval", "exec", "Path.touch", "open", "getattr", "torch.save", "torch.load"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("file", ["common.pt", ".metadata", "object"])
def test_code_in_files_is_not_run(checkpoint: Path, tmp_path: Path, file: str, call: str) -> None:
    trace = tmp_path / "trace"
    payload = Payload(trace, call)
    if file == "common.pt":
        torch.save({"n": payload}, checkpoint / file)
    elif file == ".metadata":
        (checkpoint / file).write_bytes(pickle.dumps(payload))
    else:
        state = {"a": shard("a"), "b": shard("b"), "o": ShardedObject("o", payload, (1,), (0,)), "n": 3}
        dist_checkpointing.save(state, checkpoint)
    try:
        loaded = dist_checkpointing.load(request(), checkpoint)
    except CheckpointingException:
        pass
    else:
        assert any(is_stub(loaded[key]) for key in ("n", "o"))
    assert not trace.exists()


# ---- foreign files ----


def test_objects_of_unknown_classes_become_stubs(tmp_path: Path) -> None:
    module = types.ModuleType("megatron_elsewhere")

    class RerunMode(enum.Enum):
        DISABLED = "disabled"

    class Diagnostic:
        def __init__(self) -> None:
            self.count = 3

    for cls in (RerunMode, Diagnostic):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    sys.modules[module.__name__] = module
    try:
        torch.save({"mode": RerunMode.DISABLED, "state": [Diagnostic()], "w": torch.ones(2)}, tmp_path / "f.pt")
    finally:
        del sys.modules[module.__name__]
    loaded = safe_torch_load(tmp_path / "f.pt")
    assert is_stub(loaded["state"][0]) and loaded["state"][0].state == {"count": 3}
    assert type(loaded["state"][0]).__name__ == "megatron_elsewhere.Diagnostic"
    assert is_stub(loaded["mode"]) and torch.equal(loaded["w"], torch.ones(2))


def test_values_that_checkpoints_hold_come_back_whole(tmp_path: Path) -> None:
    import random

    value = {
        "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16, path=Path("/x"), sizes=(1, [2]), names={"a"}),
        "python": random.getstate(),
        "numpy": np.random.RandomState(1).get_state(),
        "scalar": np.float64(2.5),
        "bytes": b"\x00\xff",
        "size": torch.Size([1, 2]),
    }
    torch.save(value, tmp_path / "f.pt")
    loaded = safe_torch_load(tmp_path / "f.pt")
    assert vars(loaded["args"]).keys() == vars(value["args"]).keys()
    assert loaded["args"].dtype is torch.bfloat16 and str(loaded["args"].path) == "/x"
    assert loaded["python"] == value["python"] and loaded["scalar"] == 2.5 and loaded["bytes"] == b"\x00\xff"
    np.testing.assert_array_equal(loaded["numpy"][1], value["numpy"][1])
    np.random.RandomState().set_state(loaded["numpy"])


def test_metadata_with_the_plans_of_another_release_is_read(checkpoint: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlan

    metadata = FileSystemReader(checkpoint).read_metadata()
    metadata.all_local_plans = [MCoreSavePlan([], mcore_data={"a": {}})]
    text = pickle.dumps(metadata).replace(b"MCoreSavePlan", b"OtherSavePlan")
    (checkpoint / ".metadata").write_bytes(text)
    assert torch.equal(dist_checkpointing.load(request(), checkpoint)["a"], torch.arange(1000.0))


# ---- damage ----


def test_truncated_data_is_noticed_before_anything_is_read(checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = largest.stat().st_size
    os.truncate(largest, whole - 10)
    wanted = request()
    with pytest.raises(
        CheckpointingException, match=f"{largest.name} is truncated: it has {whole - 10} bytes, {whole}"
    ):
        dist_checkpointing.load(wanted, checkpoint)
    assert bool((wanted["a"].data == -1).all() and (wanted["b"].data == -1).all())


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "metadata.json"])
def test_missing_files_are_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    message = "not a complete distributed checkpoint" if name == "metadata.json" else rf"{name} is missing"
    with pytest.raises(CheckpointingException, match=message):
        dist_checkpointing.load(request(), checkpoint)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04", b"PK\x03\x04" + b"\x00" * 100])
def test_files_of_garbage_are_named(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointingException, match=name):
        dist_checkpointing.load(request(), checkpoint)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointingException, match="does not exist"):
        dist_checkpointing.load({}, tmp_path / "nowhere")
    with pytest.raises(CheckpointingException, match="does not exist"):
        dist_checkpointing.save({"a": shard("a")}, tmp_path / "nowhere")


# ---- failure while saving ----


def save_with_failing_rank(directory: str, failing: int) -> str:
    from megatron.core.dist_checkpointing.strategies import file_plan

    rank, size = dist.get_rank(), dist.get_world_size()
    original = file_plan.write_plans

    def write(plans: list, directory: Path) -> dict:
        if rank == failing:
            original(plans[:1], directory)
            raise OSError(28, "No space left on device")
        return original(plans, directory)

    file_plan.write_plans = write
    try:
        rows = ShardedTensor.from_rank_offsets("w", torch.ones(2, 2), (0, rank, size))
        dist_checkpointing.save({"w": rows}, directory)
    except CheckpointingException as error:
        return str(error)
    finally:
        file_plan.write_plans = original
    return ""


@pytest.mark.parametrize("failing", [0, 2])
def test_one_rank_without_space_fails_all_ranks_and_leaves_nothing(tmp_path: Path, failing: int) -> None:
    messages = run_ranks(3, save_with_failing_rank, str(tmp_path), failing)
    assert len(set(messages)) == 1
    assert f"cannot write {tmp_path}" in messages[0]
    assert f"No space left on device (rank {failing})" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_recognised_where_torch_hides_it() -> None:
    with pytest.raises((OSError, RuntimeError)) as error:
        torch.save(torch.zeros(100_000), "/dev/full")
    text = describe(error.value)
    assert "disk is full" in text or "No space left on device" in text


def save_beyond_limit(directory: str) -> str:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        dist_checkpointing.save({"w": shard("w", 200_000)}, directory)
    except CheckpointingException as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_file_that_may_not_grow_is_a_clear_error(tmp_path: Path) -> None:
    (message,) = run_ranks(1, save_beyond_limit, str(tmp_path))
    assert f"cannot write {tmp_path}" in message and "File too large" in message
    assert list(tmp_path.iterdir()) == []


# ---- bombs ----


def compressed(path: Path) -> None:
    """Replace an archive by one that unpacks to 256 MiB."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w") as member:
        for _ in range(256):
            member.write(bytes(1 << 20))


class Bomb:
    """Unpickling this fills the memory."""

    def __init__(self, function: type, argument: object) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple:
        return self.function, (self.argument,)


BOMBS = [(bytearray, 10**12), (bytes, 10**12), (list, range(10**12)), (tuple, range(10**12)), (set, range(10**12))]


@pytest.mark.parametrize("file", ["common.pt", "object", ".metadata"])
@pytest.mark.parametrize(("function", "argument"), BOMBS, ids=lambda value: getattr(value, "__name__", ""))
def test_values_that_only_grow_when_they_are_loaded_are_refused(
    checkpoint: Path, file: str, function: type, argument: object
) -> None:
    bomb = Bomb(function, argument)
    if file == ".metadata":
        (checkpoint / file).write_bytes(pickle.dumps(bomb))
    elif file == "common.pt":
        torch.save({"n": bomb}, checkpoint / file)
    else:
        state = {"a": shard("a"), "b": shard("b"), "o": ShardedObject("o", bomb, (1,), (0,)), "n": 3}
        dist_checkpointing.save(state, checkpoint)
    with pytest.raises(CheckpointingException, match="cannot be read"):
        dist_checkpointing.load(request(), checkpoint)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(checkpoint: Path) -> None:
    compressed(checkpoint / "common.pt")
    assert (checkpoint / "common.pt").stat().st_size < 10 << 20
    with pytest.raises(
        CheckpointingException, match="common.pt cannot be read .*is compressed, .* claim to be 268435456"
    ):
        dist_checkpointing.load(request(), checkpoint)
