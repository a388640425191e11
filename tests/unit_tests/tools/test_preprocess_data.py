import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.datasets.encoding import DocumentEncoder
from megatron.training.datasets.input_files import InputFiles
from megatron.training.datasets.json_lines import InputError
from megatron.training.datasets.preprocessing import Output, preprocess
from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer
from megatron.training.tokenizer.null_tokenizer import NullTokenizer
from tests.unit_tests.tokenizer.vocabularies import SENTENCES, write_bpe
from tools.preprocess_data import parse_args, run

ROOT = Path(__file__).parents[3]
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def run_tool(path: str, prefix: Path, *flags: str) -> None:
    run(parse_args(["--input", path, "--output-prefix", str(prefix), "--workers", "1", *NULL, *flags]))


def documents(prefix: str) -> list[list[list[int]]]:
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices.tolist()
    return [[sequence.tolist() for sequence in dataset[begin:end]] for begin, end in zip(ends, ends[1:])]


def test_documents_sentences_and_keys(tmp_path: Path) -> None:
    records = [
        {"text": "1 2 3", "title": "7", "more": None},
        {"text": "", "title": ["8 9", "", "10"]},
        {"text": [], "title": ""},
    ]
    path = write_lines(tmp_path / "in.jsonl", records)
    run_tool(path, tmp_path / "out", "--json-key", "text", "title")
    assert documents(f"{tmp_path}/out_text_document") == [[[1, 2, 3]], [], []]
    assert documents(f"{tmp_path}/out_title_document") == [[[7]], [[8, 9], [10]], []]
    run_tool(path, tmp_path / "eod", "--json-keys", "text", "title", "--append-eod")
    assert documents(f"{tmp_path}/eod_text_document") == [[[1, 2, 3, 100]], [], []]
    assert documents(f"{tmp_path}/eod_title_document") == [[[7, 100]], [[8, 9], [10, 100]], []]


def test_unusual_but_valid_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "1"}\r\n\n  \n{"x": {"text": 5}, "text": "2 3"}\n{"text": "4\\n5"}')
    run_tool(str(path), tmp_path / "out")
    assert documents(f"{tmp_path}/out_text_document") == [[[1]], [[2, 3]], [[4, 5]]]
    path.write_bytes(b"")
    run_tool(str(path), tmp_path / "out")
    assert documents(f"{tmp_path}/out_text_document") == []


def test_gzip_and_patterns(tmp_path: Path) -> None:
    for i, name in enumerate(["b.jsonl", "a.jsonl.gz"]):
        with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wb") as file:
            file.write(b'{"text": "%d"}' % i)
    run_tool(f"{tmp_path}/*.jsonl*", tmp_path / "out")
    assert documents(f"{tmp_path}/out_text_document") == [[[1]], [[0]]]
    data = (tmp_path / "a.jsonl.gz").read_bytes()
    for damaged in (data[:-5], data[:-14] + b"\xff\xff" + data[-12:], data[:-8] + bytes(8)):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: damaged gzip file"):
            run_tool(f"{tmp_path}/a.jsonl.gz", tmp_path / "out")


@pytest.fixture(scope="module")
def bpe_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_bpe(tmp_path_factory.mktemp("bpe"))


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}_text_document.bin").read_bytes(), Path(f"{prefix}_text_document.idx").read_bytes()


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, bpe_files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.training.datasets.input_files._BLOCK_BYTES", 2000)
    texts = [sentence * (i % 7) for i, sentence in enumerate(SENTENCES * 10)]
    path = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    tokenizer = GPT2BPETokenizer(*bpe_files)
    encoder = DocumentEncoder(tokenizer, ["text"], append_eod=True)
    for workers in (1, 3):
        stream = io.StringIO()
        output = Output(str(tmp_path / f"w{workers}"), ("text",))
        counts = preprocess(InputFiles(path), output, encoder, workers, 50, stream)
        assert (counts.documents, counts.bad_lines) == (200, 0)
        lines = stream.getvalue().splitlines()
        assert lines[-1].startswith("Processed 200 documents (") and lines[-1].endswith(" MB/s).")
        assert 4 <= len(lines) <= 6
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w3")
    expected = [[tokenizer.tokenize(text) + [tokenizer.eod]] if text else [] for text in texts]
    assert documents(f"{tmp_path}/w3_text_document") == expected


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    path = write_lines(tmp_path / "in.jsonl", [{"text": "1"}] * 5)
    stream = Terminal()
    encoder = DocumentEncoder(NullTokenizer(10), ["text"], append_eod=False)
    preprocess(InputFiles(path), Output(str(tmp_path / "out"), ("text",)), encoder, 1, 1000, stream)
    first, last = stream.getvalue().split("\r")[1:]
    assert "100%, 0:00 left" in first and last.startswith("Processed 5 documents (")


@pytest.mark.parametrize("sequential", [False, True])
def test_partitions(tmp_path: Path, sequential: bool) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": str(i)} for i in range(7)])
    flags = ["--partitions", "3", "--workers", "3"] + ["--keep-sequential-samples"] * sequential
    run_tool(path, tmp_path / "out", *flags)
    order = [0, 1, 2, 3, 4, 5, 6] if sequential else [0, 3, 6, 1, 4, 2, 5]
    assert documents(f"{tmp_path}/out_text_document") == [[[i]] for i in order]
    assert documents(f"{tmp_path}/out_0_text_document") == [[[i]] for i in order[:3]]
    assert (tmp_path / "in_2.jsonl").exists()


def test_partitions_of_an_older_input_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for number in (1, 2):
        write_lines(path, [{"text": str(number)}] * 4)
        if number == 2:
            os.utime(path, (time.time() + 5, time.time() + 5))
        run_tool(str(path), tmp_path / "out", "--partitions", "2", "--workers", "2")
        assert documents(f"{tmp_path}/out_text_document") == [[[number]]] * 4


# -- bad input -----------------------------------------------------------------------------------------

GOOD = b'{"text": "1"}\n'
BAD_LINES = [
    (b'{"text": "1"', r":2:13: invalid JSON: Expecting ',' delimiter"),
    (b'{"text": 1"}', r":2:11: invalid JSON"),
    (b"\xef\xbb\xbf" + GOOD, r":2(:1)?: invalid JSON"),
    (b"text", r":2:1: invalid JSON: Expecting value"),
    (b'{"text": "a\tb"}', r":2:12: invalid JSON: Invalid control character"),
    (b'{"text": "1"} {}', r":2:15: invalid JSON: Extra data"),
    (b"[" * 100000, r":2: invalid JSON: nested too deeply"),
    (b'{"text": "\xff"}', r":2:11: invalid UTF-8: byte 0xff \(invalid start byte\)"),
    (b'{"text": "caf\xc3"}', r":2:14: invalid UTF-8: byte 0xc3 \(invalid continuation byte\)"),
    (b'{"text": "\xed\xa0\x80"}', r":2:11: invalid UTF-8"),
    (b'{"text": "1", "t": "\xc0\x80"}', r":2:21: invalid UTF-8"),
    (b'{"Text": "1", "b": 2}', r":2: no key 'text'; the keys of this line: 'Text', 'b'"),
    (b"{}", r":2: no key 'text'; the keys of this line: none"),
    (b"[1, 2]", r":2: expected a JSON object, found a list"),
    (b'"text"', r":2: expected a JSON object, found a string"),
    (b"null", r":2: expected a JSON object, found null"),
    (b"7", r":2: expected a JSON object, found a number"),
    (b'{"text": null}', r":2: 'text' must be a string or a list of strings, found null"),
    (b'{"text": 5}', r":2: 'text' must be a string .*, found a number"),
    (b'{"text": true}', r":2: 'text' must be a string .*, found true or false"),
    (b'{"text": ["1", 2]}', r":2: 'text' must be a string .*, found a list"),
    (b'{"text": {"1": 2}}', r":2: 'text' must be a string .*, found an object"),
    (b'{"text": "\\ud800 x"}', r":2: 'text' has half of a surrogate pair, \\ud800"),
]


@pytest.mark.parametrize(
    ("line", "message", "workers"),
    [(*case, 1) for case in BAD_LINES] + [(*BAD_LINES[0], 2), (*BAD_LINES[7], 2)],
)
def test_bad_lines_are_named_and_nothing_changes(tmp_path: Path, line: bytes, message: str, workers: int) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD)
    run_tool(str(path), tmp_path / "out")
    before = files_of(tmp_path / "out")
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=r"in\.jsonl" + message):
        run_tool(str(path), tmp_path / "out", "--workers", str(workers))
    assert files_of(tmp_path / "out") == before
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["in.jsonl", "out_text_document.bin", "out_text_document.idx"]


def test_line_numbers_are_right_in_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.training.datasets.input_files._BLOCK_BYTES", 30)
    for bad in range(1, 20, 3):
        lines = [GOOD] * 20
        lines[bad - 1] = b'{"text": "\xff"}\n'
        (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
        with pytest.raises(InputError, match=rf"in\.jsonl:{bad}:11: invalid UTF-8"):
            run_tool(str(tmp_path / "in.jsonl"), tmp_path / "out")


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": "1"}])
    with pytest.raises(FileNotFoundError, match="no input file /nowhere/x.jsonl"):
        run_tool("/nowhere/x.jsonl", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no file that ends with \.jsonl"):
        run_tool(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(OSError, match="in.jsonl"):
        run_tool(path, Path(path) / "out")  # below a file


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "0"], "--only has no effect without --partitions"),
        (["--ray-address", "auto"], "--ray-address has no effect without --partitions"),
        (["--partition-by", "files"], "--partition-by files has no effect without --partitions"),
        (["--partitions", "2", "--only", "2"], "--only 2: choose split, merge or a partition from 0 to 1"),
        (["--partitions", "2", "--only", "0", "--ray-address", "x"], "choose one"),
        (["--input", "-", "--resume"], "--resume: standard input"),
        (["--input", "-", "-"], "names standard input .* twice"),
        (["--input", "-", "--workers", "2", "--partitions", "2", "--keep-sequential"], "reads the input twice"),
        (["--keep-newlines"], "--keep-newlines has no effect without --split-sentences"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--partitions", "2"], r"--workers \(1\) must be a multiple of --partitions \(2\)"),
        (["--log-interval", "0"], "--log-interval must be at least 1"),
        (["--json-keys", "a", "a"], "names a key twice: a a"),
        (["--tokenizer-type", "Nonsense"], "invalid choice: 'Nonsense'"),
    ],
)
def test_bad_command_lines(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--input", "i", "--output-prefix", "o", "--workers", "1", *NULL, *flags])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# -- the program ---------------------------------------------------------------------------------------


def program(path: str, prefix: Path, *flags: str) -> list[str]:
    tool = str(ROOT / "tools" / "preprocess_data.py")
    return [sys.executable, tool, "--input", path, "--output-prefix", str(prefix), *NULL, *flags]


def test_the_program_says_what_is_wrong_and_fails(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b'{"text": "1"')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = program(str(tmp_path / "in.jsonl"), tmp_path / "out", "--workers", "2")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        f"error: {tmp_path}/in.jsonl:2:13: invalid JSON: Expecting ',' delimiter"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_killed_program_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "%s"}\n' % b" ".join([b"12"] * 3000) * 500)
    os.mkfifo(tmp_path / "pipe")  # never ends: the program waits in the middle of its work
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = program(str(tmp_path / "pipe"), tmp_path / "out", "--workers", "2", "--log-interval", "1")
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running,
        open(tmp_path / "pipe", "wb") as pipe,
    ):
        pipe.write(path.read_bytes())
        pipe.flush()
        assert running.stderr is not None and "Processed" in running.stderr.readline()
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert sorted(entry.name for entry in tmp_path.glob("out*")) == ["out_text_document.bin.partial"]
    run_tool(str(path), tmp_path / "out")
    assert len(documents(f"{tmp_path}/out_text_document")) == 500
