"""The BPE vocabularies that the trainer writes: complete, reversible, in GPT-2's files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).resolve().parents[3]
SENTENCES = [
    "The whale, the whale!",
    "A whale-ship was my Yale College and my Harvard.",
    "Call me Ishmael.",
] * 20


def train_bpe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/train_bpe.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    return path


def test_vocabulary_has_the_size_asked_for_and_ends_in_end_of_text(corpus: Path, tmp_path: Path) -> None:
    result = train_bpe("--input", str(corpus), "--vocab-size", "300", "--output-dir", str(tmp_path / "vocab"))
    assert result.returncode == 0, result.stderr
    vocabulary = json.loads((tmp_path / "vocab/vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(300))
    assert vocabulary["<|endoftext|>"] == 299
    merges = (tmp_path / "vocab/merges.txt").read_text().splitlines()
    assert merges[0] == "#version: 0.2"
    assert len(merges) == 1 + 300 - 256 - 1


def test_any_text_survives_encoding(corpus: Path, tmp_path: Path) -> None:
    train_bpe("--input", str(corpus), "--vocab-size", "280", "--output-dir", str(tmp_path))
    tokenizer = ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in (SENTENCES[0], "Ünï¢ode, 鯨 \U0001f40b\n\ttabs", " leading blank"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    result = train_bpe("--input", str(path), "--vocab-size", "300", "--output-dir", str(tmp_path / "vocab"))
    assert result.returncode != 0
    assert f"{path}, line 2: not valid JSON" in result.stderr
    assert not (tmp_path / "vocab").exists()


def test_a_missing_key_is_named(corpus: Path, tmp_path: Path) -> None:
    arguments = ("--json-keys", "body", "--vocab-size", "300", "--output-dir", str(tmp_path))
    result = train_bpe("--input", str(corpus), *arguments)
    assert result.returncode != 0
    assert "line 1: no key body" in result.stderr


def test_a_vocabulary_smaller_than_the_bytes_is_refused(corpus: Path, tmp_path: Path) -> None:
    result = train_bpe("--input", str(corpus), "--vocab-size", "200", "--output-dir", str(tmp_path))
    assert result.returncode != 0
    assert "--vocab-size (200) must exceed 256" in result.stderr
