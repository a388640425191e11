"""Where text may come from, and how a run is cut into parts."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.training.datasets import input_files, long_lines, preprocess_run
from megatron.training.datasets.json_lines import InputError, LineBlock
from megatron.training.datasets.long_lines import LongLine
from megatron.training.datasets.partitions import assign_files
from tests.unit_tests.tokenizer.vocabularies import write_bpe
from tests.unit_tests.tools.preprocess_helpers import documents, files_of, run_tool, write_lines


def line(number: int) -> bytes:
    return b'{"text": "%d"}\n' % number


# -- inputs --------------------------------------------------------------------------------------------


def test_several_inputs_of_all_kinds_in_order(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "b.json").write_bytes(line(4))
    (tmp_path / "folder" / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(line(5)) + gzip.compress(line(6)))
    (tmp_path / "folder" / "notes.txt").write_text("no input")
    (tmp_path / "folder" / "old.jsonl.partial").write_text("no input")
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "z.jsonl.zst").write_bytes(compress(line(1)) + compress(line(2) + line(3)))
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [1, 2], "text": ["7", "8 9"], "title": ["10", "11"]}), tmp_path / "p.parquet"
    )
    for name in ("x1.jsonl", "x0.jsonl"):
        (tmp_path / name).write_bytes(line(20 + int(name[1])))
    names = [str(tmp_path / name) for name in ("z.jsonl.zst", "folder", "p.parquet", "x?.jsonl")]
    run_tool(names, tmp_path / "out")
    assert documents(tmp_path / "out_text_document") == [[[i]] for i in range(1, 8)] + [[[8, 9]], [[20]], [[21]]]
    run_tool(names[2], tmp_path / "two", "--json-keys", "title", "text")
    assert documents(tmp_path / "two_title_document") == [[[10]], [[11]]]
    run_tool(names, tmp_path / "parts", "--partitions", "2", "--workers", "2")
    assert documents(tmp_path / "parts_text_document")[:2] == [[[1]], [[3]]]
    assert len(documents(tmp_path / "parts_text_document")) == 10
    assert (tmp_path / "parts_input_0.jsonl").exists()  # not where a pattern would find it the next time


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (line(1) + line(2), gzip.compress(line(1) + line(2))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]
        run_tool("-", tmp_path / "out")
        assert documents(tmp_path / "out_text_document") == [[[1]], [[2]]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(line(1) + b"{"))))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="standard input:2:2: invalid JSON"):
        run_tool("-", tmp_path / "out")


def test_damaged_compressed_files(tmp_path: Path) -> None:
    import zstandard

    lines = b"".join(map(line, range(90))) * 500
    data = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    for damaged in (data[:-1], data[:50], data[:30] + b"\xff\xff\xff" + data[33:], data + data[:20]):
        (tmp_path / "z.jsonl.zst").write_bytes(damaged)
        with pytest.raises(InputError, match=r"z\.jsonl\.zst: damaged zstd file after line"):
            run_tool(str(tmp_path / "z.jsonl.zst"), tmp_path / "out")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(InputError, match=r"p\.parquet: damaged Parquet file"):
        run_tool(str(tmp_path / "p.parquet"), tmp_path / "out")


def test_bad_rows_and_columns_of_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["1", None, "3"]}), path)
    with pytest.raises(InputError, match=r"p\.parquet:2: 'text' must be a string or a list of strings, found null"):
        run_tool(path, tmp_path / "out")
    run_tool(path, tmp_path / "out", "--skip-bad-lines")
    assert documents(tmp_path / "out_text_document") == [[[1]], [[3]]]
    with pytest.raises(InputError, match=r"p\.parquet:1: no column 'title'; the columns of this file: 'text'"):
        run_tool(path, tmp_path / "out", "--json-keys", "title")


def test_bad_lines_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [b'{"text": "1"\n', b"[]\n", b'{"text": "\xff"}\n', b'{"text": 7}\n', b"{}\n"] * 3
    content = b"".join(line(i) + broken for i, broken in enumerate(bad))
    (tmp_path / "in.jsonl").write_bytes(content)
    for workers in ("1", "2"):
        run_tool(str(tmp_path / "in.jsonl"), tmp_path / "out", "--skip-bad-lines", "--workers", workers)
        assert documents(tmp_path / "out_text_document") == [[[i]] for i in range(15)]
        listed = (tmp_path / "out_bad_lines.txt").read_text().splitlines()
        assert len(listed) == 15 and listed[1] == f"{tmp_path}/in.jsonl:4: expected a JSON object, found a list"
        assert listed[2].endswith("in.jsonl:6:11: invalid UTF-8: byte 0xff (invalid start byte)")
        said = capsys.readouterr().err
        assert f"15 lines were left out, as {tmp_path}/out_bad_lines.txt lists:" in said
        assert said.count("in.jsonl:") == 10 and said.rstrip().endswith("...")


# -- partitions, steps, resuming -----------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_lines(tmp_path / "in.jsonl", [{"text": str(i), "more": f"{i} {i}"} for i in range(9)])


FLAGS = ["--partitions", "3", "--json-keys", "text", "more"]


@pytest.mark.parametrize("sequential", [False, True])
def test_steps_by_themselves_write_what_one_run_writes(tmp_path: Path, corpus: str, sequential: bool) -> None:
    flags = [*FLAGS, *["--keep-sequential-samples"] * sequential]
    run_tool(corpus, tmp_path / "one", *flags, "--workers", "3")
    with pytest.raises(ValueError, match="3 partitions are not finished: .*/steps_0, .*/steps_1, .*/steps_2"):
        run_tool(corpus, tmp_path / "steps", *flags, "--only", "merge")
    for step in ("split", "2", "0", "1", "merge"):
        run_tool(corpus, tmp_path / "steps", *flags, "--only", step)
    for name in ("text_document", "more_document", "1_text_document"):
        assert files_of(tmp_path / f"one_{name}") == files_of(tmp_path / f"steps_{name}")


def test_whole_files_as_partitions(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"f{i}.jsonl").write_bytes(line(2 * i) + line(2 * i + 1))
    flags = ["--partitions", "2", "--partition-by", "files", "--workers", "2"]
    run_tool(f"{tmp_path}/f?.jsonl", tmp_path / "turns", *flags)
    assert documents(tmp_path / "turns_text_document") == [[[i]] for i in (0, 1, 4, 5, 8, 9, 2, 3, 6, 7)]
    run_tool(f"{tmp_path}/f?.jsonl", tmp_path / "runs", *flags, "--keep-sequential-samples")
    assert documents(tmp_path / "runs_text_document") == [[[i]] for i in range(10)]
    assert not list(tmp_path.glob("*input*"))  # nothing is copied


def test_runs_of_files_are_of_about_equal_size(tmp_path: Path) -> None:
    paths = []
    for i, size in enumerate([10, 10, 500, 10, 10, 200, 300]):
        paths.append(str(tmp_path / str(i)))
        Path(paths[-1]).write_bytes(bytes(size))
    parts = assign_files(paths, 2, sequential=True)
    assert sum(parts, []) == paths and list(map(len, parts)) == [3, 4]
    assert sum(assign_files(paths, 20, sequential=True), []) == paths


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    encoded: list[str] = []
    original = preprocess_run.preprocess

    def counted(files, output, *rest):
        encoded.append(Path(output.prefix).name)
        return original(files, output, *rest)

    monkeypatch.setattr(preprocess_run, "preprocess", counted)
    return encoded


def test_resuming_keeps_finished_partitions(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_encoded(monkeypatch)
    run_tool(corpus, tmp_path / "full", *FLAGS, "--workers", "3")
    for step in ("split", "1"):
        run_tool(corpus, tmp_path / "out", *FLAGS, "--only", step)
    encoded.clear()
    run_tool(corpus, tmp_path / "out", *FLAGS, "--workers", "3", "--resume")
    assert encoded == ["out_0", "out_2"]
    assert files_of(tmp_path / "out_text_document") == files_of(tmp_path / "full_text_document")
    encoded.clear()
    run_tool(corpus, tmp_path / "out", *FLAGS, "--workers", "3", "--resume")
    assert encoded == []
    run_tool(corpus, tmp_path / "out", *FLAGS, "--workers", "3")  # without the flag: all over again
    assert encoded == ["out_0", "out_1", "out_2"]


@pytest.mark.parametrize("change", ["settings", "input", "token file", "index", "record"])
def test_resuming_redoes_what_does_not_fit(
    tmp_path: Path, corpus: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tool(corpus, tmp_path / "out", *FLAGS, "--workers", "3")
    encoded = count_encoded(monkeypatch)
    flags = list(FLAGS)
    match change:
        case "settings":
            flags.append("--append-eod")
        case "input":
            os.utime(tmp_path / "in_1.jsonl", (time.time() + 9, time.time() + 9))
        case "token file":
            (tmp_path / "out_1_more_document.bin").write_bytes(b"")
        case "index":
            (tmp_path / "out_1_text_document.idx").unlink()
        case "record":
            (tmp_path / "out_1_document.done.json").write_text('{"settings"')
    run_tool(corpus, tmp_path / "out", *flags, "--workers", "3", "--resume")
    assert encoded == (["out_0", "out_1", "out_2"] if change == "settings" else ["out_1"])


def test_resuming_a_run_without_partitions(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_encoded(monkeypatch)
    for _ in range(2):
        run_tool(corpus, tmp_path / "out", "--resume")
    assert encoded == ["out"]


def test_partitions_of_another_kind_are_not_used(tmp_path: Path, corpus: str) -> None:
    run_tool(corpus, tmp_path / "a", "--partitions", "3", "--workers", "3")
    run_tool(corpus, tmp_path / "b", "--partitions", "2", "--workers", "2")
    assert documents(tmp_path / "b_text_document") == [[[i]] for i in (0, 2, 4, 6, 8, 1, 3, 5, 7)]
    run_tool(corpus, tmp_path / "c", "--partitions", "2", "--workers", "2", "--keep-sequential-samples")
    assert documents(tmp_path / "c_text_document") == [[[i]] for i in range(9)]


def test_partitions_made_elsewhere_are_used(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        (tmp_path / f"in_{i}.jsonl").write_bytes(line(50 + i))
        os.utime(tmp_path / f"in_{i}.jsonl", (time.time() + 9, time.time() + 9))
    run_tool(corpus, tmp_path / "out", "--partitions", "2", "--workers", "2")
    assert documents(tmp_path / "out_text_document") == [[[50]], [[51]]]
    assert "in_1.jsonl as they are" in capsys.readouterr().err


@pytest.mark.slow
def test_partitions_on_a_local_ray_cluster(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="the optional package ray is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        run_tool(corpus, tmp_path / "ray", "--partitions", "2", "--workers", "2", "--ray-address", "auto")
    finally:
        ray.shutdown()
    run_tool(corpus, tmp_path / "here", "--partitions", "2", "--workers", "2")
    assert files_of(tmp_path / "ray_text_document") == files_of(tmp_path / "here_text_document")


# -- sentences -----------------------------------------------------------------------------------------


@pytest.fixture
def no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_run, "find_parameters", lambda language: None)


PROSE = [
    {"text": "Call me Ishmael. Some years ago I went to sea!\nIt was Dr. Coffin who asked.", "n": 1},
    {"text": ""},
    {"text": ["One. Two.", "Three."]},
]


def words(directory: Path) -> list[str]:
    vocab_file, merge_file = write_bpe(directory)
    return ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab_file, "--merge-file", merge_file]


def decoded(prefix: Path, flags: list[str]) -> list[list[str]]:
    from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer

    tokenizer = GPT2BPETokenizer(flags[3], flags[5])
    return [[tokenizer.detokenize(sequence) for sequence in document] for document in documents(prefix)]


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentences(tmp_path: Path, no_nltk_data: None, keep_newlines: bool) -> None:
    path, bpe = write_lines(tmp_path / "in.jsonl", PROSE), words(tmp_path)
    flags = [*bpe, "--split-sentences", "--append-eod", *["--keep-newlines"] * keep_newlines]
    run_tool(path, tmp_path / "out", *flags)
    end, space, newline = "<|endoftext|>", " " * keep_newlines, "\n" * keep_newlines
    expected = [
        ["Call me Ishmael." + space, "Some years ago I went to sea!" + newline, f"It was Dr. Coffin who asked.{end}"],
        [],
        ["One." + space, "Two.", f"Three.{end}"],
    ]
    assert decoded(tmp_path / "out_text_sentence", bpe) == expected
    copy = [json.loads(row)["text"] for row in (tmp_path / "in_ss.jsonl").read_text().splitlines()]
    assert copy == [[sentence.removesuffix(end) for sentence in document] for document in expected]
    # the copy is used from now on
    before = (tmp_path / "in_ss.jsonl").stat().st_mtime_ns
    for name, more in (("again", []), ("parts", ["--partitions", "1", "--workers", "2"])):
        run_tool(path, tmp_path / name, *flags, *more)
        assert files_of(tmp_path / "out_text_sentence") == files_of(tmp_path / f"{name}_text_sentence")
    assert (tmp_path / "in_ss.jsonl").stat().st_mtime_ns == before
    os.utime(path, (time.time() + 9, time.time() + 9))  # a newer input is split again
    run_tool(path, tmp_path / "out", *flags)
    assert (tmp_path / "in_ss.jsonl").stat().st_mtime_ns > before


def test_sentences_of_partitions(tmp_path: Path, no_nltk_data: None) -> None:
    path, bpe = write_lines(tmp_path / "in.jsonl", PROSE), words(tmp_path)
    flags = [*bpe, "--split-sentences", "--partitions", "2", "--workers", "2", "--keep-sequential-samples"]
    run_tool(path, tmp_path / "out", *flags)
    assert list(map(len, decoded(tmp_path / "out_text_sentence", bpe))) == [3, 0, 3]
    assert (tmp_path / "in_ss_0.jsonl").exists() and (tmp_path / "in_ss_1.jsonl").exists()
    (tmp_path / "in_ss_1.jsonl").write_text('{"text": ["made elsewhere"]}\n')
    run_tool(path, tmp_path / "out", *flags)
    assert decoded(tmp_path / "out_text_sentence", bpe)[2] == ["made elsewhere"]


def test_sentences_of_an_unknown_language(tmp_path: Path, no_nltk_data: None) -> None:
    path = write_lines(tmp_path / "in.jsonl", PROSE)
    with pytest.raises(ValueError, match="--lang estonian: no folder tokenizers/punkt_tab/estonian under \\$NLTK_DATA"):
        run_tool(path, tmp_path / "out", "--split-sentences", "--lang", "estonian")


# -- long lines ----------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is long and what a piece is, so small that every border is met."""
    monkeypatch.setattr(input_files, "_BLOCK_BYTES", 40)
    monkeypatch.setattr(input_files, "_LONG_LINE_BYTES", 100)
    monkeypatch.setattr(long_lines, "_LONG_STRING", 20)
    monkeypatch.setattr(long_lines, "_PIECE_BYTES", 7)


@pytest.mark.parametrize("kind", ["plain", "gz", "workers", "partitions"])
def test_long_lines_are_tokenized_like_others(tmp_path: Path, small_pieces: None, kind: str) -> None:
    rng = random.Random(1)
    records = []
    for _ in range(30):
        numbers = [" ".join(str(rng.randrange(100)) for _ in range(rng.choice([0, 3, 30, 200]))) for _ in range(3)]
        records.append({"text": rng.choice([numbers[0], numbers]), 'o"th\\er': "é\n" * rng.randrange(60), "more": "1"})
    path = write_lines(tmp_path / "in.jsonl", records)
    if kind == "gz":
        path += ".gz"
        Path(path).write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    more = {"workers": ["--workers", "2"], "partitions": ["--partitions", "2", "--workers", "2", "--keep-seq"]}
    run_tool(path, tmp_path / "out", "--append-eod", "--json-keys", "text", "more", *more.get(kind, []))
    expected = []
    for record in records:
        texts = [record["text"]] if isinstance(record["text"], str) else record["text"]
        sequences = [list(map(int, text.split())) for text in texts if text]
        expected.append([*sequences[:-1], [*sequences[-1], 100]] if sequences else [])
    assert documents(tmp_path / "out_text_document") == expected
    assert documents(tmp_path / "out_more_document") == [[[1, 100]]] * 30
    assert not list(tmp_path.glob("*.partial"))


def test_sentences_of_long_lines(tmp_path: Path, small_pieces: None, no_nltk_data: None) -> None:
    text = "It was the best of times. It was the worst of times! Was it? " * 5
    path, bpe = write_lines(tmp_path / "in.jsonl", [{"text": text}, {"text": "Short. Line."}]), words(tmp_path)
    run_tool(path, tmp_path / "out", *bpe, "--split-sentences")
    found = decoded(tmp_path / "out_text_sentence", bpe)
    assert found[0] == ["It was the best of times.", "It was the worst of times!", "Was it?"] * 5
    assert [json.loads(row)["text"] for row in (tmp_path / "in_ss.jsonl").open()] == found


JSON_TEXT = st.text(st.sampled_from('ab "\\/\n\té你🎉{}[],:\x00\x7f'), max_size=80)


@settings(max_examples=150, deadline=None)
@given(text=JSON_TEXT, other=JSON_TEXT, ascii_only=st.booleans(), cut=st.none() | st.integers(0, 200))
def test_long_lines_are_parsed_like_others(
    tmp_path_factory: pytest.TempPathFactory, text: str, other: str, ascii_only: bool, cut: int | None
) -> None:
    """The same values or the same kind of error, also of a line that is cut off or lacks something in the middle."""
    data = json.dumps({"other": other, "text": text, "n": [1, {"a": other}]}, ensure_ascii=ascii_only).encode()
    if cut is not None:
        data = data[:cut] + data[cut + 1 :]
    path = tmp_path_factory.getbasetemp() / "line.jsonl"
    path.write_bytes(data)
    saved = long_lines._LONG_STRING, long_lines._PIECE_BYTES
    try:
        long_lines._LONG_STRING, long_lines._PIECE_BYTES = 12, 5
        long = LongLine(str(path), 1, str(path), 0, len(data))
        try:
            expected = next(iter(LineBlock(str(path), 1, data).records(["text"], None)))[1]["text"]
        except InputError:
            with pytest.raises(InputError):
                long.values(["text"])
        else:
            (value,) = long.values(["text"])["text"]
            assert (value if isinstance(value, str) else "".join(long.decode(value, "text"))) == expected[0]
    finally:
        long_lines._LONG_STRING, long_lines._PIECE_BYTES = saved


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 30, "invalid UTF-8"),
        (b"a" * 30 + b"\xc3", "invalid UTF-8"),
        (b"\\ud83d" * 9, r"'text' has half of a surrogate pair, \\ud83d"),
        (b"a" * 30 + b"\\udc00", r"'text' has half of a surrogate pair, \\udc00"),
        (b"\\q" * 30, "invalid JSON: Invalid"),
        (b"\\u12" * 30, "invalid JSON: Invalid"),
        (b"a" * 30 + b"\t", "invalid JSON: Invalid control character"),
        (b"a" * 30 + b'", "b": ', "invalid JSON"),
    ],
)
def test_bad_long_lines(tmp_path: Path, small_pieces: None, content: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line(1) + b'{"text": "1 2", "b": "' + b"x" * 200 + b'", "text": "' + content + b'"}\n' + line(2))
    with pytest.raises(InputError, match=r"in\.jsonl:2: " + message):
        run_tool(str(path), tmp_path / "out", *words(tmp_path))
    run_tool(str(path), tmp_path / "out", *words(tmp_path), "--skip-bad-lines")
    assert len(documents(tmp_path / "out_text_document")) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_strings_that_nobody_wants_may_be_odd(tmp_path: Path, small_pieces: None) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"b": "' + b"\\ud83d" * 99 + b'", "text": "1 2"}\n{"b": "\\ud83d", "text": "3"}\n')
    run_tool(str(path), tmp_path / "out")
    assert documents(tmp_path / "out_text_document") == [[[1, 2]], [[3]]]


def test_tokens_out_of_range_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.tokenizer.null_tokenizer import NullTokenizer

    monkeypatch.setattr(NullTokenizer, "tokenize_flat", lambda self, texts: (numpy.array([-200]), numpy.array([1])))
    with pytest.raises(ValueError, match="token ids -200 to -200 do not fit into uint16"):
        run_tool(write_lines(tmp_path / "in.jsonl", [{"text": "1"}]), tmp_path / "out")


@pytest.mark.parametrize("scheduler", [False, True])
def test_the_array_job(tmp_path: Path, corpus: str, scheduler: bool) -> None:
    """Step by step without a scheduler; with one (which here runs a job at once) the same three jobs."""
    import subprocess

    environment = os.environ | {
        "INPUT": corpus,
        "OUTPUT_PREFIX": str(tmp_path / "out"),
        "PARTITIONS": "2",
        "WORKERS": "1",
    }
    environment["PATH"] = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    if scheduler:
        (tmp_path / "bin").mkdir()
        fake = tmp_path / "bin" / "sbatch"
        fake.write_text(
            '#!/usr/bin/env bash\nset -e\necho "$@" >>"$OUTPUT_PREFIX.jobs"\ntasks=0\n'
            'while (($#)); do case "$1" in --array) tasks=$(seq ${2/-/ });; --wrap) work=$2;; esac; shift; done\n'
            'for SLURM_ARRAY_TASK_ID in $tasks; do export SLURM_ARRAY_TASK_ID; bash -c "$work" >&2; done\necho 7\n'
        )
        fake.chmod(0o755)
    script = Path(__file__).parents[3] / "examples/data/preprocess_slurm.sh"
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    ended = subprocess.run(["bash", str(script), *flags], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    run_tool(corpus, tmp_path / "one", "--partitions", "2", "--workers", "2")
    assert files_of(tmp_path / "out_text_document") == files_of(tmp_path / "one_text_document")
    if scheduler:
        jobs = (tmp_path / "out.jobs").read_text().splitlines()
        assert len(jobs) == 3 and "--array 0-1 --dependency afterok:7" in jobs[1] and "afterok:7" in jobs[2]
