"""Merging data sets, plain text for translation, texts with pictures."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.training.datasets.json_lines import InputError
from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer
from tests.unit_tests.tokenizer.vocabularies import write_bpe
from tests.unit_tests.tools.preprocess_helpers import documents, files_of, write_lines
from tools import merge_datasets, preprocess_data_nmt, preprocess_mmdata


def write_dataset(prefix: Path, documents: list[list[list[int]]], multimodal: bool = False, dtype=numpy.int32) -> None:
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal) as builder:
        for document in documents:
            for i, sequence in enumerate(document):
                builder.add_item(numpy.array(sequence, dtype), mode=i % 2)
            builder.end_document()
        builder.finalize(f"{prefix}.idx")


def random_documents(seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [[[rng.randrange(9) for _ in range(rng.randrange(5))] for _ in range(rng.randrange(3))] for _ in range(40)]


def merge(folder: Path, prefix: Path, *flags: str) -> None:
    merge_datasets.run(merge_datasets.parse_args(["--input", str(folder), "--output-prefix", str(prefix), *flags]))


@pytest.mark.parametrize("multimodal", [False, True])
def test_merged_is_one_after_another(tmp_path: Path, multimodal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.datasets.indexed_dataset_builder._COPIED_ROWS", 7)
    monkeypatch.setattr("megatron.core.datasets.spilled_array._CHUNK", 10)
    parts = {name: random_documents(i) for i, name in enumerate(["b", "a_10", "a_2", "empty"])}
    parts["empty"] = []
    for name, content in parts.items():
        write_dataset(tmp_path / name, content, multimodal)
    everything = sum((parts[name] for name in sorted(parts)), [])
    write_dataset(tmp_path.parent / f"expected{multimodal}", everything, multimodal)
    flags = ["--multimodal"] * multimodal
    for _ in range(2):  # the second time its own output is in the folder, too
        merge(tmp_path, tmp_path / "out", *flags)
        assert files_of(tmp_path / "out") == files_of(tmp_path.parent / f"expected{multimodal}")


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are no data sets to merge"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder /nowhere"):
        merge(Path("/nowhere"), tmp_path / "out")
    write_dataset(tmp_path / "a", [[[1]]])
    write_dataset(tmp_path / "b", [[[1]]], dtype=numpy.uint16)
    with pytest.raises(ValueError, match="stores uint16, it cannot be appended"):
        merge(tmp_path, tmp_path / "out")
    (tmp_path / "b.idx").unlink()
    with pytest.raises(FileNotFoundError, match=r"has b\.bin without the other file"):
        merge(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin"]


@pytest.fixture
def bpe(tmp_path: Path) -> list[str]:
    vocab_file, merge_file = write_bpe(tmp_path)
    return ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab_file, "--merge-file", merge_file]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_lines_of_text_keep_their_places(tmp_path: Path, bpe: list[str], workers: str) -> None:
    lines = ["the dog", "", '{"not": "json"}', "Größe 你好"] * 50
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--input", str(tmp_path / "in.txt"), "--output-prefix", str(tmp_path / "out"), "--workers", workers, *bpe]
    preprocess_data_nmt.run(preprocess_data_nmt.parse_args(flags))
    tokenizer = GPT2BPETokenizer(bpe[3], bpe[5])
    found = documents(tmp_path / "out")
    assert [[tokenizer.detokenize(sequence) for sequence in document] for document in found] == [
        [line] for line in lines
    ]
    (tmp_path / "in.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(InputError, match=r"in\.txt:2:5: invalid UTF-8: byte 0xff"):
        preprocess_data_nmt.run(preprocess_data_nmt.parse_args(flags))
    with pytest.raises(SystemExit):
        preprocess_data_nmt.parse_args(flags[:4])


def test_texts_with_pictures(tmp_path: Path, bpe: list[str]) -> None:
    (tmp_path / "pictures").mkdir()
    content = [bytes(range(n)) for n in (0, 5, 8, 7)]
    for i, data in enumerate(content):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(data)
    texts = ["the dog", "a model is trained on text", "", "sea shells"]
    path = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    flags = ["--input", path, "--input-image", str(tmp_path / "pictures"), "--output-prefix", str(tmp_path / "out")]
    flags += [*bpe, "--pad-length", "6"]
    tokenizer = GPT2BPETokenizer(bpe[3], bpe[5])
    for more in ([], ["--append-eod"]):
        preprocess_mmdata.run(preprocess_mmdata.parse_args([*flags, *more]))
        dataset = IndexedDataset(f"{tmp_path}/out_text", multimodal=True)
        assert dataset.document_indices.tolist() == [0, 2, 4, 6, 8] and dataset.index.dtype is numpy.int32
        for i, (text, data) in enumerate(zip(texts, content)):
            ids = tokenizer.tokenize(text)
            expected = (ids + [tokenizer.eod] * 6)[:6] if more else ids
            tokens, mode = dataset[2 * i]
            assert tokens.tolist() == expected and mode == 0
            picture, mode = dataset[2 * i + 1]
            assert picture[1:].tobytes() == data + bytes(picture[0]) and mode == 1 and 0 <= picture[0] < 4
    (tmp_path / "pictures" / "extra.png").write_bytes(b"1")
    with pytest.raises(InputError, match="there are 4 texts for 5 pictures"):
        preprocess_mmdata.run(preprocess_mmdata.parse_args(flags))
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").unlink()
    with pytest.raises(InputError, match="more texts than the 2 pictures"):
        preprocess_mmdata.run(preprocess_mmdata.parse_args(flags))
    with pytest.raises(SystemExit):
        preprocess_mmdata.parse_args([*flags, "--split-sentences"])
