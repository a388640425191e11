"""Files of embeddings, and tables of passages."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy
import pytest

from megatron.training.retrieval.block_data import BlockData
from megatron.training.retrieval.passages import Passage, read_evidence
from megatron.training.settings import ConfigurationError


def vectors(rows: int) -> numpy.ndarray:
    return numpy.random.RandomState(rows).standard_normal((rows, 4))


def test_shards_become_one_file(tmp_path: Path) -> None:
    path = tmp_path / "blocks.pkl"
    for rank in range(2):
        data = BlockData(path)
        data.add_block_data([10 * rank, 10 * rank + 1], vectors(2) + rank)
        data.save_shard(rank)
    assert sorted(p.name for p in (tmp_path / "blocks_tmp").iterdir()) == ["0.pkl", "1.pkl"]
    BlockData(path).merge_shards_and_save(2)
    assert [p.name for p in tmp_path.iterdir()] == ["blocks.pkl"]
    loaded = BlockData.load(path).embed_data
    assert list(loaded) == [0, 1, 10, 11]
    assert loaded[10].dtype == numpy.float16 and (loaded[11] == (vectors(2)[1] + 1).astype(numpy.float16)).all()
    with pytest.raises(ValueError, match="two blocks have the id 10"):
        BlockData(path, loaded).add_block_data([10], vectors(1))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_of_other_programs_are_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "other.pkl"
    rows = {3: vectors(1)[0].astype(numpy.float16)}
    path.write_bytes(pickle.dumps({"embed_data": rows}, protocol=protocol))
    assert (BlockData.load(path).embed_data[3] == rows[3]).all()


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    "content",
    [
        b"nothing of this kind",
        pickle.dumps({"embed_data": {0: Harmful()}}),
        pickle.dumps([1, 2]),
        pickle.dumps({"embed_data": {0: vectors(1)[0], 1: vectors(1)}}),
        pickle.dumps({"embed_data": {0: numpy.zeros(4), 1: numpy.zeros(5)}}),
    ],
)
def test_other_files_are_refused_and_not_run(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="does not hold embeddings"):
        BlockData.load("x.pkl")
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(ValueError, match="create_doc_index.py writes them"):
        BlockData.load("y.pkl")


def test_evidence_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "wiki.tsv"
    lines = [f'{i}\t"text ""{i}"" of it"\ttitle {i}' for i in range(1, 41)]
    path.write_text("doc_id\ttext\ttitle\n" + "\n".join(lines) + "\n")
    found = read_evidence(path)
    assert len(found) == 40 and found[4] == Passage(5, 'text "5" of it', "title 5")
    some = read_evidence(path, share=0.25, seed=3)
    assert len(some) == 10 and some == read_evidence(path, share=0.25, seed=3)
    assert some != read_evidence(path, share=0.25, seed=4) and set(some) < set(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id\ttext\ttitle\n1\ta\tb\n", "columns doc_id, text, title are expected"),
        ("doc_id\ttext\ttitle\n", "no passages"),
        ("doc_id\ttext\ttitle\n1\ta\n", "line 2: three columns are expected, found 2"),
        ("doc_id\ttext\ttitle\nx\ta\tb\n", "line 2: doc_id is a number, found 'x'"),
        ("doc_id\ttext\ttitle\n1\ta\tb\n1\ta\tb\n", "line 3: doc_id 1 is there twice"),
    ],
)
def test_other_tables_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_evidence(path)
