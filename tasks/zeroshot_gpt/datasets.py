"""What WikiText perplexity and LAMBADA ask a model: tokens, and which of them it is to predict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.inference.scoring import ScoredText
from megatron.training.settings import ConfigurationError, refuse_unless
from tasks.zeroshot_gpt.detokenizer import corpus_of, detokenize


def windows(tokens: list[int], length: int, stride: int) -> list[ScoredText]:
    """Windows of `length` predictions over a text of which each token but the first is predicted once.

    A window begins `stride` tokens after the one before it, and predicts what that one has not.

    >>> [(w.tokens, w.first) for w in windows([0, 1, 2, 3, 4, 5, 6], length=4, stride=2)]
    [([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5, 6], 3)]
    """
    found = [ScoredText(tokens[: length + 1], 1)]
    for begin in range(stride, len(tokens), stride):
        done = begin + length - stride + 1  # the first token that no window before this one has predicted
        if done >= len(tokens):
            break
        found.append(ScoredText(tokens[begin : begin + length + 1], done - begin))
    return found


@dataclass(frozen=True)
class WikiText:
    """A text whose words are separated by spaces, as the corpus is published."""

    path: Path
    words: str

    @classmethod
    def read(cls, path: Path, flag: str = "--valid-data") -> WikiText:
        """Raises `ConfigurationError` if the file is no text, or a text of fewer than two words."""
        try:
            words = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{flag} {path}: this is no UTF-8 text ({error})") from None
        text = cls(path, words)
        refuse_unless(text.num_words > 1, f"{flag} {path}: at least two words are needed, found {text.num_words}")
        return text

    @property
    def num_words(self) -> int:
        """As the perplexity per word counts them."""
        return len(self.words.strip().split(" "))

    def tokenize(self, tokenizer: Any) -> list[int]:
        """The running text in the model's tokens."""
        return list(tokenizer.tokenize(detokenize(self.words, corpus_of(self.path))))


@dataclass(frozen=True)
class Lambada:
    """Passages whose last word is to be guessed (Paperno et al., arXiv:1606.06031)."""

    passages: list[str]

    @classmethod
    def read(cls, path: Path, flag: str = "--valid-data") -> Lambada:
        """One JSON object a line, with the passage as `text`. Raises `ConfigurationError` for anything else."""
        passages = []
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    passages.append(_passage(line, f"{flag} {path}, line {number}"))
        refuse_unless(passages, f"{flag} {path}: there are no passages in it")
        return cls(passages)

    def texts(self, tokenizer: Any, length: int, *, whole_word: bool) -> list[ScoredText]:
        """A passage's last token, or its last word with `whole_word`, after at most `length` tokens in all.

        Passages that are longer lose their beginning.
        """
        return [_last_of(passage, tokenizer, length, whole_word) for passage in self.passages]


def _passage(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(
            f'{where}: no JSON ({error}); LAMBADA is one object a line, such as {{"text": "..."}}'
        ) from None
    text = entry.get("text") if isinstance(entry, dict) else None
    refuse_unless(isinstance(text, str), f'{where}: an object with a "text" is expected, found {str(entry)[:80]}')
    refuse_unless(len(text.split()) > 1, f"{where}: a passage has at least two words, found {text!r}")
    return text


def _last_of(passage: str, tokenizer: Any, length: int, whole_word: bool) -> ScoredText:
    if whole_word:
        word = passage.split()[-1]
        before = list(tokenizer.tokenize(passage[: passage.rfind(word)].strip()))
        last = list(tokenizer.tokenize(" " + word))
    else:
        tokens = list(tokenizer.tokenize(passage))
        before, last = tokens[:-1], tokens[-1:]
    if not before or not last:
        raise ValueError(f"the tokenizer leaves nothing to predict, or nothing before it, of {passage!r}")
    kept = before[-max(1, length + 1 - len(last)) :]
    return ScoredText([*kept, *last][: length + 1], len(kept))
