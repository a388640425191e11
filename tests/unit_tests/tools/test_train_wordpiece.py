"""The WordPiece vocabularies that the trainer writes are such as BertWordPieceTokenizer reads."""

import json
import subprocess
import sys
from pathlib import Path

from megatron.training.tokenizer.bert_tokenizer import BertWordPieceTokenizer

ROOT = Path(__file__).resolve().parents[3]
SENTENCES = ["The whale, the whale!", "A whale-ship was my Yale College and my Harvard.", "Call me Ishmael."] * 20


def test_vocabulary_splits_its_own_text(tmp_path: Path) -> None:
    corpus, vocabulary = tmp_path / "corpus.jsonl", tmp_path / "new" / "vocab.txt"
    corpus.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    words = ["--input", str(corpus), "--vocab-size", "120", "--lower-case", "--output", str(vocabulary)]
    command = [sys.executable, str(ROOT / "tools/train_wordpiece.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pieces = vocabulary.read_text().splitlines()
    assert len(pieces) == len(set(pieces)) <= 120
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lower_case=True)
    ids = list(tokenizer.tokenize(SENTENCES[1]))
    assert pieces.index("[UNK]") not in ids
    assert "".join(pieces[i].removeprefix("##") for i in ids) == SENTENCES[1].lower().replace(" ", "")
    assert "whale" in pieces
