"""Preprocessing that is killed, fed with damaged files, or given much to read."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.training.datasets.json_lines import InputError
from tests.unit_tests.tokenizer.vocabularies import write_bpe
from tests.unit_tests.tools.preprocess_helpers import documents, run_tool

ROOT = Path(__file__).parents[3]


def prose(num_bytes: int) -> str:
    text = gzip.decompress((ROOT / "examples/data/moby_dick.txt.gz").read_bytes()).decode("utf-8")
    return (text * (num_bytes // len(text) + 1))[:num_bytes]


# -- killed --------------------------------------------------------------------------------------------


def run_in_child(path: str, prefix: Path, flags: list[str]) -> int:
    """The id of a new process that preprocesses; its exit status is 0 if all went well."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run_tool(path, prefix, *flags)
        status = 0
    finally:
        os._exit(status)


def data_files(folder: Path) -> dict[str, bytes]:
    """All that a run wrote and calls complete."""
    kept = (path for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".jsonl"))
    return {path.name: path.read_bytes() for path in kept}


@pytest.mark.parametrize("workers", [3, 6])
def test_killed_at_any_moment(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times in all: every file under a final name is what a run that is left alone writes."""
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setattr("megatron.training.datasets.input_files._BLOCK_BYTES", 4000)
    vocab_file, merge_file = write_bpe(tmp_path)
    flags = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab_file, "--merge-file", merge_file]
    flags += ["--split-sentences", "--partitions", "3", "--workers", str(workers), "--append-eod"]
    text = prose(60_000)
    lines = [json.dumps({"text": text[i : i + 1500]}) + "\n" for i in range(0, len(text), 1500)]
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "in.jsonl").write_text("".join(lines))
    run_tool(str(tmp_path / "alone" / "in.jsonl"), tmp_path / "alone" / "out", *flags)
    expected = data_files(tmp_path / "alone")
    start = time.monotonic()
    child = run_in_child(str(tmp_path / "alone" / "in.jsonl"), tmp_path / "alone" / "again", flags)
    assert os.waitpid(child, 0)[1] == 0
    duration = time.monotonic() - start

    rng, killed = random.Random(workers), tmp_path / "killed"
    for attempt in range(14 if workers == 3 else 6):
        more = ["--resume"] * (attempt % 2)
        child = run_in_child(str(killed / "in.jsonl"), killed / "out", [*flags, *more])
        time.sleep(rng.uniform(0, duration * 1.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name, content in data_files(killed).items():
            assert content == expected[name], f"{name} after attempt {attempt}"
        for index in killed.glob("*.idx"):
            documents(index.with_suffix(""))  # a pair that is there can be read
    run_tool(str(killed / "in.jsonl"), killed / "out", *flags, "--resume")
    assert data_files(killed) == {name: content for name, content in expected.items() if "again" not in name}
    assert not list(killed.glob("*.partial"))


# -- damaged -------------------------------------------------------------------------------------------


def write_dataset(folder: Path) -> Path:
    rng = numpy.random.default_rng(1)
    with IndexedDatasetBuilder(str(folder / "d.bin"), numpy.int32) as builder:
        for size in (3, 1, 4, 1, 5, 9, 2, 6):
            builder.add_item(rng.integers(0, 1000, size, dtype=numpy.int32))
            if size % 2:
                builder.end_document()
        builder.end_document()
        builder.finalize(str(folder / "d.idx"))
    return folder / "d"


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut off, longer, or with some of them changed, lost or doubled."""
    at, size = rng.randrange(len(data)), rng.choice([1, 1, 1, 4, 8, 20])
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data + rng.randbytes(size)
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[:at] + data[at : at + size] + data[at:]
        case 4:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case _:
            number = struct.pack("<q", rng.choice([-1, 0, 1, 2**31, 2**40, 2**63 - 1, -(2**63)]))
            return data[:at] + number[:size] + data[at + size :]


def content(prefix: Path) -> list[list[int]]:
    return [sequence.tolist() for sequence in IndexedDataset(str(prefix))[:]]


def test_damaged_indices_and_token_files(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path)
    index, tokens, expected = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes(), content(prefix)
    rng, refused = random.Random(7), 0
    for case in range(300):
        in_index = case % 4 < 3
        damaged = damage(index if in_index else tokens, rng)
        Path(f"{prefix}.idx").write_bytes(damaged if in_index else index)
        Path(f"{prefix}.bin").write_bytes(tokens if in_index else damaged)
        try:
            found = content(prefix)
        except ValueError as error:
            assert str(prefix) in str(error) and len(str(error)) < 400
            refused += 1
            continue
        if in_index:
            # What the format cannot tell: another type of numbers of the same size, another border of documents.
            same_tokens = found == expected or damaged[17:18] != index[17:18]
            assert same_tokens and list(map(len, found)) == list(map(len, expected))
        else:
            assert len(damaged) == len(tokens)  # other tokens, as many
    assert refused > 200


def random_line(rng: random.Random) -> bytes:
    value = rng.choice(["1 2 3", ["1", "2 3"], "", [], None, 5, {"a": 1}, ["1", 2], "7 \ud83d", "8\n9"])
    record = {rng.choice(["text", "text", "other"]): value, "more": rng.choice([0.5, None, [True], "\u00e9\U0001f389"])}
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return damage(line, rng) if rng.random() < 0.7 else line


def expected_document(line: bytes) -> list[list[int]] | None:
    """What a line stands for; None: it must be refused."""
    try:
        value = json.loads(line.decode("utf-8"))["text"]
        texts = [value] if isinstance(value, str) else value
        "".join(texts).encode("utf-8")
        numbers = [[int(word) for word in text.split()] for text in texts]
    except (ValueError, KeyError, TypeError):
        return None
    return [sequence for sequence in numbers if sequence] if isinstance(texts, list) else None


def test_damaged_json(tmp_path: Path) -> None:
    """Each line becomes its document or an error that names it; with --skip-bad-lines, all at once."""
    rng, path = random.Random(3), tmp_path / "in.jsonl"
    lines = [line for line in (random_line(rng).replace(b"\n", b" ") for _ in range(400)) if line.strip()]
    expected = [expected_document(line) for line in lines]
    refused = [i for i, document in enumerate(expected) if document is None]
    assert len(refused) > 200
    for i in refused[:60]:
        path.write_bytes(b'{"text": "1"}\n' + lines[i] + b"\n")
        with pytest.raises((InputError, ValueError)) as caught:
            run_tool(str(path), tmp_path / "out")
        assert "in.jsonl:2" in str(caught.value) or "is not a token id" in str(caught.value)
        assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]
    tokens_only = [i for i in range(len(lines)) if not is_bad_token(lines[i])]
    path.write_bytes(b"".join(lines[i] + b"\n" for i in tokens_only))
    run_tool(str(path), tmp_path / "out", "--skip-bad-lines")
    assert documents(tmp_path / "out_text_document") == [expected[i] for i in tokens_only if expected[i] is not None]
    listed = (tmp_path / "out_bad_lines.txt").read_text().splitlines()
    numbers = [int(row.removeprefix(f"{path}:").split(":")[0]) for row in listed]
    assert numbers == [row for row, i in enumerate(tokens_only, 1) if expected[i] is None]


def is_bad_token(line: bytes) -> bool:
    """Whether a line is good JSON with words that are no token ids, which is for the tokenizer to say."""
    try:
        value = json.loads(line.decode("utf-8"))["text"]
        texts = [value] if isinstance(value, str) else value
        "".join(texts).encode("utf-8")
    except (ValueError, KeyError, TypeError):
        return False
    words = [word for text in texts for word in text.split()] if isinstance(texts, list) else []
    return any(not word.isdecimal() or int(word) > 100 for word in words)


# -- memory --------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from tools.preprocess_data import parse_args, run
run(parse_args(sys.argv[1:]))
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def peak_kib(path: Path, flags: list[str]) -> int:
    command = [
        sys.executable,
        "-c",
        PEAK,
        "--input",
        str(path),
        "--output-prefix",
        str(path) + ".out",
        "--workers",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.parametrize("one_line", [False, True])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, one_line: bool) -> None:
    vocab_file, merge_file = write_bpe(tmp_path)
    flags = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab_file, "--merge-file", merge_file]
    peaks = []
    for megabytes in (5, 25):
        text = prose(megabytes << 20)
        texts = [text] if one_line else [text[i : i + 2000] for i in range(0, len(text), 2000)]
        path = tmp_path / f"{megabytes}.jsonl"
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in texts))
        del text, texts
        peaks.append(peak_kib(path, flags))
    assert peaks[1] - peaks[0] < 15 << 10, peaks  # 20 MB more text, of which not even the bytes are kept
