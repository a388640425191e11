"""Tiny vocabularies, trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import ByteLevelBPETokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A model is trained on text; the text is cut into tokens, and the tokens are numbers.",
    "Größe, naïve café, 你好世界 and 🎉 are words as well.",
    "She sells sea shells by the sea shore: one, two, three, 12, 345.",
] * 5


def write_bpe(directory: Path, vocab_size: int = 380) -> tuple[str, str]:
    """vocab.json and merges.txt in the layout of GPT-2; <|endoftext|> is the last id."""
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator(SENTENCES, vocab_size=vocab_size - 1, min_frequency=1, show_progress=False)
    vocab_file, merge_file = (str(path) for path in tokenizer.save_model(str(directory)))
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = len(vocab)
    Path(vocab_file).write_text(json.dumps(vocab), encoding="utf-8")
    return vocab_file, merge_file


def write_sentencepiece(directory: Path, **options: object) -> str:
    """A SentencePiece BPE model with byte fallback, like Llama's: unk 0, bos 1, eos 2, no padding."""
    prefix = str(directory / "spm")
    (directory / "text.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    settings = {
        "model_type": "bpe",
        "vocab_size": 360,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=prefix, **(settings | options)
    )
    return prefix + ".model"
