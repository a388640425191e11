"""Index files under murder, change and concurrency: nothing half-made or out of date is ever taken for an index."""

import json
import logging
import math
import os
import random
import signal
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch

from megatron.core.datasets import index_cache, rank_order
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.index_cache import IndexCache
from tests.unit_tests.datasets.data_files import gpt_config, random_documents, write_dataset
from tests.worker_pool import run_ranks

NUM_KILLS = 20


def big_arrays() -> dict[str, numpy.ndarray]:
    return {name: numpy.arange(50_000, dtype=numpy.int64) * k for k, name in enumerate("abc", 1)}


def build_in_child(directory: str, lines: float) -> int:
    """Build the index in a process that kills itself before it runs this many lines of the cache's code; how many it
    ran."""
    pipe, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        ran = 0

        def trace(frame: types.FrameType, event: str, argument: object) -> object:
            nonlocal ran
            if frame.f_code.co_filename != index_cache.__file__:
                return None
            ran += event == "line"
            if ran >= lines:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            cache = IndexCache(directory, "x", "description")
            cache.load_or_build(tuple("abc"), lambda arrays: None, big_arrays)
            os.write(theirs, str(ran).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(theirs)
    with open(pipe) as file:
        return int(file.read() or lines)


def test_killed_at_any_moment_leaves_nothing_that_passes_for_an_index(tmp_path: Path) -> None:
    complete = tmp_path / "complete"
    lines = build_in_child(str(complete), math.inf)
    assert lines > NUM_KILLS
    expected = {path.name: path.read_bytes() for path in complete.iterdir()}
    assert len(expected) == 5
    rng, num_unfinished = random.Random(1), 0
    for kill in range(NUM_KILLS):
        directory = tmp_path / str(kill)
        build_in_child(str(directory), rng.randrange(1, lines + 1))
        described = (directory / "x-description.txt").exists()
        num_unfinished += not described
        cache = IndexCache(str(directory), "x", "description")
        arrays, built = cache.load_or_build(tuple("abc"), lambda arrays: None, big_arrays)
        assert built == (not described)
        assert all(numpy.array_equal(arrays[name], array) for name, array in big_arrays().items())
        files = {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}
        assert files == expected
    assert num_unfinished > NUM_KILLS // 2  # else the test has tested nothing


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (f".x-a.npy.{'0a' * 16}", f".x-b.npy.{'1b' * 16}", ".x-note.txt"))
    other.write_text("of somebody else")
    os.utime(other, (0, 0))
    old.write_bytes(b"half")
    new.write_bytes(b"half of another process")
    os.utime(old, (0, 0))
    IndexCache(str(tmp_path), "x", "description").load_or_build(tuple("abc"), lambda arrays: None, big_arrays)
    assert not old.exists() and new.exists() and other.exists()


def build(prefix: str, directory: Path) -> GPTDataset:
    config = gpt_config(blend=([prefix], None), split="1,0,0", path_to_cache=str(directory))
    return BlendedMegatronDatasetBuilder(GPTDataset, [20, 0, 0], lambda: True, config).build()[0]


def test_changed_data_is_noticed_by_its_hash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = [[1] * 30, [2] * 40, [3] * 30, [4] * 40]
    prefix = write_dataset(tmp_path / "d", documents)
    assert build(prefix, tmp_path / "cache").built_anew_on_cache_miss
    assert not build(prefix, tmp_path / "cache").built_anew_on_cache_miss
    os.utime(f"{prefix}.idx", (1, 1))  # a copy of the data: another time, the same content
    assert not build(prefix, tmp_path / "cache").built_anew_on_cache_miss
    write_dataset(tmp_path / "d", [documents[i] for i in (1, 0, 3, 2)])  # as many tokens and bytes
    assert build(prefix, tmp_path / "cache").built_anew_on_cache_miss
    assert "d.idx has another content: the data has changed since" in caplog.text
    write_dataset(tmp_path / "d", [*documents, [5] * 50])
    assert build(prefix, tmp_path / "cache").built_anew_on_cache_miss


def test_index_of_another_program_is_taken_without_a_manifest(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(30))
    first = build(prefix, tmp_path / "cache")
    (manifest,) = (tmp_path / "cache").glob("*-manifest.json")
    assert json.loads(manifest.read_text())["sources"][0]["file"] == "d.idx"
    manifest.unlink()
    again = build(prefix, tmp_path / "cache")
    assert not again.built_anew_on_cache_miss and numpy.array_equal(again.sample_index, first.sample_index)


# -- several ranks -------------------------------------------------------------------------------------


class SlowDataset(GPTDataset):
    """Building takes until another rank has said that it waits for it; it fails if told so by a file."""

    def _build_indices(self) -> dict[str, numpy.ndarray]:
        if torch.distributed.get_rank() == 0:
            store = torch.distributed.distributed_c10d._get_default_store()
            store.wait(["somebody has said so"])
            if Path(f"{self.dataset_path}.fail").exists():
                raise ValueError("the disk is full")
        return super()._build_indices()


def forbid_collectives() -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective")

    for name in ("barrier", "all_gather_object", "broadcast_object_list", "all_reduce", "all_gather", "broadcast"):
        setattr(torch.distributed, name, refuse)


def build_slowly(prefix: str, directory: str, remove: bool) -> tuple[bool, str, list[int]]:
    """(built here, log, tokens) of this rank, rank 0 being slow."""
    saved = dict(vars(torch.distributed))
    lines: list[str] = []
    handler = logging.Handler()
    store = torch.distributed.distributed_c10d._get_default_store()

    def emit(record: logging.LogRecord) -> None:
        lines.append(record.getMessage())
        if ": rank 0 builds " in lines[-1]:
            store.set("somebody has said so", "")

    handler.emit = emit
    logging.getLogger("megatron.core.datasets").addHandler(handler)
    logging.getLogger("megatron.core.datasets").setLevel(logging.INFO)
    period, rank_order._REPORT_SECONDS = rank_order._REPORT_SECONDS, 0.2
    forbid_collectives()
    try:
        config = gpt_config(blend=([prefix], None), split="1,0,0", path_to_cache=directory)
        if remove and torch.distributed.get_rank() != 0:
            config.path_to_cache += "-of-another-node"
        dataset = BlendedMegatronDatasetBuilder(SlowDataset, [20, 0, 0], lambda: True, config).build()[0]
    finally:
        vars(torch.distributed).update(saved)
        rank_order._REPORT_SECONDS = period
        logging.getLogger("megatron.core.datasets").removeHandler(handler)
    return dataset.built_anew_on_cache_miss, "\n".join(lines), dataset[3]["tokens"].tolist()


def test_ranks_wait_for_the_file_and_say_so(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(60))
    results = run_ranks(3, build_slowly, prefix, str(tmp_path / "cache"), False)
    assert [built for built, _, _ in results] == [True, False, False]
    text = "\n".join(log for _, log, _ in results[1:])
    assert "s to wait for " in text and ": rank 0 builds " in text and "-SlowDataset-train-*" in text
    assert len({str(tokens) for *_, tokens in results}) == 1
    again = run_ranks(3, build_slowly, prefix, str(tmp_path / "cache"), False)
    assert [built for built, _, _ in again] == [False] * 3 and not any(log for _, log, _ in again)


def test_ranks_that_do_not_share_the_disk_build_their_own(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(60))
    results = run_ranks(2, build_slowly, prefix, str(tmp_path / "cache"), True)
    assert [built for built, _, _ in results] == [True, True] and results[0][2] == results[1][2]


def failing_build(prefix: str, directory: str) -> str:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        build_slowly(prefix, directory, False)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_failure_of_the_builder_reaches_those_who_wait(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(60))
    Path(f"{prefix}.fail").write_text("")
    zero, one = run_ranks(2, failing_build, prefix, str(tmp_path / "cache"))
    assert zero == "ValueError: the disk is full"
    assert one == "RuntimeError: rank 0 failed: ValueError: the disk is full"
