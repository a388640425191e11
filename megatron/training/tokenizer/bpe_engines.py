"""Engines that split text and merge bytes: the same ids at different speeds.

`tokenizers` reads any vocabulary and is the reference. tiktoken's engine is several times faster but knows
no list of merges: it joins whichever neighbours make the token of lowest id. `tiktoken_agrees` says for which
vocabularies that is the same. gigatoken is faster again and used only when asked for by name.
"""

from __future__ import annotations

import importlib.util
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
    try:
        import tiktoken
    except ImportError as error:
        raise RuntimeError("tiktoken's engine needs the package tiktoken: pip install tiktoken") from error
    # With no special token at all its search for them matches everywhere, which costs a third of the speed.
    special = {_NEVER_IN_A_TEXT: max(ranks.values()) + 1}
    encoding = tiktoken.Encoding("vocabulary", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return _join([encoding.encode_to_numpy(text, disallowed_special=()) for text in texts])

    return encode


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
