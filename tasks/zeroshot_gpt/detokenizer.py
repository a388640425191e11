"""Turns corpora that were split into words for word-level models back into running text."""

from __future__ import annotations

import re
from pathlib import Path

Rules = tuple[tuple[str, str], ...]

_WIKITEXT: Rules = (
    # contractions
    (r"s '", "s'"),
    # signs inside words and numbers, which the corpus marks
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    # punctuation sticks to the word before it
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" \. ", ". "),
    (r" ! ", "! "),
    (r" \? ", "? "),
    (r" , ", ", "),
    # nothing inside brackets and quotes touches them with a space
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    # headings
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    # the rest
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
_PENN_TREEBANK: Rules = (
    (r" '", "'"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" n't", "n't"),
    (r" N ", "1 "),
    (r"\$ 1", "$1"),
    (r"# 1", "#1"),
)
RULES: dict[str, Rules] = {"ptb": _PENN_TREEBANK, "wikitext": _WIKITEXT}
"""Corpus, as its name stands in the path of a file -> (pattern, replacement), applied in order."""


def corpus_of(path: str | Path) -> str:
    """The corpus whose rules a file gets: the one that its path names, else WikiText."""
    return next((corpus for corpus in RULES if corpus in str(path)), "wikitext")


def detokenize(text: str, corpus: str = "wikitext") -> str:
    """Running text.

    >>> detokenize(" = = Early life = = \\n He said : \\" it cost 1 @,@ 000 dollars ( or less ) \\" , didn 't he ? \\n")
    ' == Early life ==\\nHe said: "it cost 1,000 dollars (or less)", didn \\'t he?\\n'
    """
    for pattern, replacement in RULES[corpus]:
        text = re.sub(pattern, replacement, text)
    return text
