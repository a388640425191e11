"""Engines that split text and merge bytes: the same ids at different speeds.

`tokenizers` reads any vocabulary and is the reference. tiktoken's engine is several times faster but knows
no list of merges: it joins whichever neighbours make the token of lowest id. `tiktoken_agrees` says for which
vocabularies that is the same. gigatoken is faster again and used only when asked for by name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy

EngineName = Literal["auto", "tokenizers", "tiktoken", "gigatoken"]

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""How GPT-2 splits text into words (Radford et al. 2019), written so that the search never goes back."""

_NEVER_IN_A_TEXT = "\ue000never in a text\ue000"


class Engine(Protocol):
    """Ids of many texts in a row, and how many each has."""

    def __call__(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]: ...


def tokenizers_engine(tokenizer: Any) -> Engine:
    """`tokenizers.Tokenizer`: the reference."""

    def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        encoded = [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return _join([numpy.array(ids, numpy.uint32) for ids in encoded])

    return encode


def tiktoken_engine(ranks: dict[bytes, int], pattern: str) -> Engine:
    """tiktoken's engine: `ranks` are the ids of the tokens' bytes, in the order of their merges."""
    # With no special token at all its search for them matches everywhere, which costs a third of the speed.
    encoding = _tiktoken_encoding(ranks, pattern, {_NEVER_IN_A_TEXT: max(ranks.values()) + 1})

    def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return _join([encoding.encode_to_numpy(text, disallowed_special=()) for text in texts])

    return encode


def _tiktoken_encoding(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise RuntimeError("tiktoken's engine needs the package tiktoken: pip install tiktoken") from error
    return tiktoken.Encoding("vocabulary", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


# Unicode's White_Space, which \s means to tiktoken; Python's has four control characters more.
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CUT, _NEXT_TEXT = "\x01", "\x02"  # a text that has them is encoded the slow way
_BEFORE_LAST_SPACE = rf"(?=[{_SPACES}][^{_SPACES}{_CUT}{_NEXT_TEXT}])"
_AFTER_BLANK, _AFTER_NEWLINE = (re.compile(space + _BEFORE_LAST_SPACE) for space in " \n")
_AFTER_OTHER = re.compile(rf"([^\S \n]){_BEFORE_LAST_SPACE}")
_PATTERN_OF_CUT_TEXT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_JOINED_CHARACTERS = 1 << 20


def gpt2_tiktoken_engine(ranks: dict[bytes, int]) -> Engine:
    """As `tiktoken_engine` with `GPT2_PATTERN`, faster by a third to a half.

    What is slow in that pattern is its look ahead, by which the last of several white spaces goes to the next word.
    Here texts are cut before that one, and a pattern without look ahead splits the same words. Many texts become one
    text; they and the cuts are divided by special tokens, at which the engine divides before all else.
    """
    exact = tiktoken_engine(ranks, GPT2_PATTERN)
    first_free = max(ranks.values()) + 1
    special = {_CUT: first_free, _NEXT_TEXT: first_free + 1}
    encoding = _tiktoken_encoding(ranks, _PATTERN_OF_CUT_TEXT, special)

    def encode_joined(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        joined = _NEXT_TEXT.join(texts)
        if _CUT in joined or joined.count(_NEXT_TEXT) >= len(texts):  # a text has them itself
            return exact(texts)
        joined = _AFTER_BLANK.sub(" " + _CUT, joined)
        joined = _AFTER_NEWLINE.sub("\n" + _CUT, joined)
        joined = _AFTER_OTHER.sub(r"\1" + _CUT, joined)
        ids = encoding.encode_to_numpy(joined, allowed_special="all")
        ids = ids[ids != special[_CUT]]
        ends = numpy.flatnonzero(ids == special[_NEXT_TEXT])
        lengths = numpy.diff(ends, prepend=-1, append=len(ids)) - 1
        return ids[ids != special[_NEXT_TEXT]], lengths

    def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        parts = [encode_joined(part) for part in _parts_of(texts)]
        if len(parts) == 1:
            return parts[0]
        return _join([ids for ids, _ in parts])[0], _join([lengths for _, lengths in parts])[0].astype(numpy.int64)

    return encode


def _parts_of(texts: list[str]) -> Iterator[list[str]]:
    """Some texts at a time, of bounded size together."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > _JOINED_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part


def has_tiktoken() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("tiktoken") is not None


def gigatoken_engine(tokenizer: Any) -> Engine:
    """gigatoken, made from a `tokenizers.Tokenizer`."""
    try:
        import gigatoken
    except ImportError as error:
        raise RuntimeError("the tokenizer engine gigatoken needs the package: pip install gigatoken") from error
    engine = gigatoken.Tokenizer(tokenizer)

    def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return _join([engine.encode(text) for text in texts])

    return encode


def _join(encoded: list[numpy.ndarray]) -> tuple[numpy.ndarray, numpy.ndarray]:
    lengths = numpy.fromiter(map(len, encoded), numpy.int64, len(encoded))
    return numpy.concatenate(encoded) if encoded else numpy.empty(0, numpy.uint32), lengths


def tiktoken_agrees(model: Any, vocab: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether joining the neighbours that make the token of lowest id gives the ids of the merges in their order.

    It does if the results of the merges have rising ids, above those of single bytes, and the merges encode the
    bytes of each token to that token. For suppose a first step joins x and y to t without such a merge: then the merges
    alone also arrive at x, y within the bytes of t, and would not end with t.

    Args:
        model: `tokenizers.Tokenizer` of the merges that splits nothing.
        vocab: token in GPT-2's byte alphabet -> id.
    """
    results = [first + second for first, second in merges]
    if len(set(results)) < len(results):
        return False
    ids = [vocab[token] for token in results]
    first_merged = ids[0] if ids else len(vocab)
    bytes_below = all(vocab[letter] < first_merged for letter in vocab if len(letter) == 1)
    rising = all(a < b for a, b in zip(ids, ids[1:]))
    if not (bytes_below and rising):
        return False
    return all(
        found.ids == [token_id] for found, token_id in zip(model.encode_batch(results, add_special_tokens=False), ids)
    )


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte -> the byte: printable ones stand for themselves, the others follow 255."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}
