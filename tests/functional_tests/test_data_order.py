"""The samples that programs read: the same in every layout and after every interruption, as the tools say they are."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron.core.num_microbatches_calculator import build_num_microbatches_calculator
from megatron.training import utils
from megatron.training.global_vars import destroy_global_vars
from tests.functional_tests.program import TINY, run_program
from tests.unit_tests.datasets.data_files import random_documents, write_dataset
from tests.worker_pool import run_ranks
from tools import build_dataset_cache, data_explain

RAMPUP = "--rampup-batch-size 4 4 24 --train-samples 64"
BATCHES = [4] * 3 + [8] * 2 + [12] * 3  # of the steps of such a run: 4 + 4 * (consumed // 12), then 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags of a blend of two sets of documents with a cache folder."""
    folder = tmp_path_factory.mktemp("data")
    a, b = (write_dataset(folder / name, random_documents(80, seed=i)) for i, name in enumerate("ab"))
    return f"--data-path 0.3 {a} 0.7 {b} --split 90,10,0 --data-cache-path {folder / 'cache'}"


def flags_of(data: str, more: str) -> list[str]:
    tiny = [word for word in TINY if word != "--mock-data"]
    return [*tiny, *"--vocab-size 99 --global-batch-size 12 --num-layers 1".split(), *data.split(), *more.split()]


def read_batches(flags: list[str]) -> list[list[list[int]]]:
    """Run pretrain_gpt.py on this rank; the tokens of each microbatch that it reads."""
    microbatches: list[list[list[int]]] = []
    original = utils.get_batch_on_this_tp_rank

    def noting(iterator: Any) -> Any:
        batch = original(iterator)
        microbatches.append(batch["tokens"].tolist())
        return batch

    utils.get_batch_on_this_tp_rank = noting
    try:
        run_program("pretrain_gpt.py", flags)
    finally:
        utils.get_batch_on_this_tp_rank = original
    return microbatches


def global_batches(ranks: list[list[list[list[int]]]], sizes: list[int]) -> list[list[list[int]]]:
    """Samples of each global batch, in the order in which ranks and microbatches share it out."""
    samples = [row for step in zip(*ranks) for part in step for row in part]
    ends = list(itertools.accumulate(sizes))
    assert len(samples) == ends[-1]
    return [samples[end - size : end] for size, end in zip(sizes, ends)]


def hashes(batches: list[list[list[int]]]) -> list[str]:
    return [hashlib.sha256(numpy.array(batch).tobytes()).hexdigest() for batch in batches]


def run(data: str, world_size: int, micro: int, sizes: list[int], more: str = "") -> list[str]:
    flags = flags_of(data, f"{RAMPUP} --micro-batch-size {micro} {more}")
    ranks = run_ranks(world_size, read_batches, flags)
    return hashes(global_batches(ranks, sizes))


def test_same_global_batches_on_any_number_of_ranks_and_after_any_stop(data: str, tmp_path: Path) -> None:
    whole = run(data, 1, 4, BATCHES)
    assert len(set(whole)) == len(BATCHES)
    calculator, consumed = build_num_microbatches_calculator(0, [4, 4, 24], 12, 1, 1), 0
    for size in BATCHES:  # what the ramp-up of this test is
        calculator.update(consumed, consistency_check=True)
        assert calculator.get() == size
        consumed += size
    assert run(data, 1, 1, BATCHES) == whole
    assert run(data, 2, 2, BATCHES, "--no-mmap-bin-files") == whole
    saving = f"--save {tmp_path / 'ckpt'} --save-interval 100 --ckpt-format torch"
    assert run(data, 4, 1, BATCHES[:2], f"{saving} --exit-interval 2") == whole[:2]  # in the ramp-up
    more = f"{saving} --load {tmp_path / 'ckpt'}"
    assert run(data, 2, 1, BATCHES[2:5], f"{more} --exit-interval 5") == whole[2:5]
    assert run(data, 1, 4, BATCHES[5:], more) == whole[5:]


STOPPED = {
    "one rank": [(1, 4)],
    "two": [(2, 1)],
    "four": [(4, 1)],
    "another number each time": [(1, 1), (4, 1), (2, 2)],
}
"""Ranks and the size of a microbatch, of the programs in turn."""


@pytest.mark.slow
@pytest.mark.parametrize("layouts", STOPPED.values(), ids=STOPPED)
def test_stopped_and_resumed_at_every_step(data: str, tmp_path: Path, layouts: list[tuple[int, int]]) -> None:
    """A program for each step, which ends after it: together they read what one program does."""
    whole = run(data, 1, 4, BATCHES)
    more = f"--save {tmp_path} --load {tmp_path} --save-interval 100 --ckpt-format torch --exit-interval 1"
    for step, (size, (world_size, micro)) in enumerate(zip(BATCHES, itertools.cycle(layouts))):
        assert run(data, world_size, micro, [size], more) == whole[step : step + 1]


# -- tools -----------------------------------------------------------------------------------------------


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a tool with the given words in this process; ends with no trace of it."""
    monkeypatch.setenv("WORLD_SIZE", "1")  # restored afterwards, whatever the tool sets
    monkeypatch.delenv("WORLD_SIZE")

    def call(tool: Any, words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *words])
        try:
            tool.main()
        finally:
            destroy_global_vars()
            monkeypatch.delenv("WORLD_SIZE", raising=False)

    yield call
    destroy_global_vars()


def test_training_finds_every_index_that_the_tool_built(
    data: str, tmp_path: Path, command_line: Any, capsys: pytest.CaptureFixture
) -> None:
    data = data.replace("/cache", "/cache-of-tool")
    flags = flags_of(data, f"{RAMPUP} --tensor-model-parallel-size 2")
    command_line(build_dataset_cache, flags)
    printed = capsys.readouterr().out
    assert "3 of 3 indices built" in printed and "(their blend)" in printed
    folder = Path(data.split()[-1])
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_ranks(2, read_batches, flags)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    command_line(build_dataset_cache, ["--ranks", "4", *flags])
    assert "0 of 3 indices built" in capsys.readouterr().out


def test_explained_samples_are_those_that_training_reads(
    data: str, command_line: Any, capsys: pytest.CaptureFixture
) -> None:
    flags = flags_of(data, f"{RAMPUP} --micro-batch-size 2")
    ranks = run_ranks(2, read_batches, flags)
    read = global_batches(ranks, BATCHES)
    for step in (1, 4, 8):
        command_line(data_explain, ["--json", "--ranks", "2", "--step", str(step), *flags])
        found = json.loads(capsys.readouterr().out)
        assert found["consumed_samples"] == sum(BATCHES[: step - 1])
        texts = [[int(word) for word in row["text"].split()] for row in found["samples"]]
        assert [text[:-1] for text in texts] == read[step - 1]
        assert {(row["microbatch"], row["rank"]) for row in found["samples"]} == {
            (microbatch, rank) for microbatch in range(BATCHES[step - 1] // 4) for rank in range(2)
        }
    documents = {"a": random_documents(80, seed=0), "b": random_documents(80, seed=1)}
    for row in found["samples"]:
        pieces = [documents[row["dataset"][-1]][p["document"]][p["begin"] : p["end"]] for p in row["documents"]]
        assert [int(word) for word in row["text"].split()] == [token for piece in pieces for token in piece]


def test_explained_shares_and_tables(data: str, command_line: Any, capsys: pytest.CaptureFixture) -> None:
    flags = flags_of(data, RAMPUP)
    command_line(data_explain, ["--json", *flags])
    rows = {(row["split"], row["dataset"][-1]): row for row in json.loads(capsys.readouterr().out)["datasets"]}
    assert rows["train", "a"]["weight"] == 0.3 and rows["train", "a"]["samples"] == 19  # of 64
    tokens = sum(map(len, random_documents(80, seed=1)[:72]))
    assert rows["train", "b"]["tokens"] == 45 * 32 and rows["train", "b"]["epochs"] == pytest.approx(45 * 32 / tokens)
    command_line(data_explain, flags)
    assert capsys.readouterr().out.split()[:4] == ["split", "dataset", "weight", "achieved"]
    command_line(data_explain, ["--sample", "3", *flags])
    assert capsys.readouterr().out.startswith("sample 3 of train: sample ")
    for words, message in ((["--sample", "9999"], "has samples 0 to"), (["--step", "9999"], "steps 1 to 8")):
        with pytest.raises(SystemExit, match=message):
            command_line(data_explain, [*words, *flags])
