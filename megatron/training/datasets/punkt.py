"""Sentence boundaries by Punkt (Kiss and Strunk 2006, "Unsupervised multilingual sentence boundary detection").

A full stop ends a sentence unless the word before it is an abbreviation, an initial or an ordinal number; the
letters of the next word, and what is known of its usual spelling, decide the doubtful cases. The knowledge is read from
NLTK's parameter files. Boundaries are those of `nltk.tokenize.punkt`, found several times as fast: only the two words
around a possible end are looked at, without building objects for them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What each bit of a word's orthographic context says: it was seen with a capital or small letter, inside sentences.
_MID_UPPER = 1 << 2
_ANY_UPPER = 1 << 1 | 1 << 2 | 1 << 3
_BEGIN_LOWER = 1 << 4
_ANY_LOWER = 1 << 4 | 1 << 5 | 1 << 6

_ENDS = r"[.?!]"
_CLOSING = r"[)\";}\]*:@'({\[?!‘’“”«»]"  # punctuation that is no part of a word
_RUN = r"(?:-{2,}|\.{2,})"  # dashes and dots that are one token

_POSSIBLE_END = re.compile(rf"{_ENDS}(?=(?P<after>{_CLOSING}|\s+(?P<next>\S+)))")
# As above, but a sentence keeps the white space after it, and more white space than none is not asked for.
_POSSIBLE_END_KEEPING_SPACE = re.compile(rf"\S*{_ENDS}\s*(?=(?P<after>{_CLOSING}|(?P<next>\S+)))")
_TOKEN = re.compile(
    rf"{_RUN}|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_CLOSING}|{_RUN}|,(?=$|\s|{_CLOSING}|{_RUN}))|\S"
)
_AFTER_A_SENTENCE = re.compile(r"[\"')\]}‘’“”«»]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_CLOSING_QUOTES = frozenset("\"')]}‘’“”«»")  # what _AFTER_A_SENTENCE begins with
_NUMBER = re.compile(r"^-?[.,]?\d[\d,.\-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")
_ELLIPSIS = re.compile(r"\.\.+$")
_LONGEST_PLAIN_WORD = 24
_LONGEST_REMEMBERED, _MOST_REMEMBERED = 64, 1 << 16  # characters, contexts: some 10 MB
_PUNCTUATION = frozenset(";:,.!?")


@dataclass(frozen=True)
class PunktParameters:
    """What is known of a language."""

    abbreviations: frozenset[str]
    """In small letters, without the last full stop."""
    collocations: frozenset[tuple[str, str]]
    """Words around a full stop that no sentence ends between."""
    sentence_starters: frozenset[str]
    orthography: dict[str, int] = field(repr=False)
    """Word -> bits that say how it was seen written."""


class PunktSplitter:
    """Cuts text into sentences.

    Args:
        keep_newlines: a sentence keeps the white space that follows it.
    """

    def __init__(self, parameters: PunktParameters, keep_newlines: bool = False) -> None:
        self.parameters = parameters
        self.keep_newlines = keep_newlines
        self._possible_end = _POSSIBLE_END_KEEPING_SPACE if keep_newlines else _POSSIBLE_END
        self._doubtful = parameters.abbreviations | {first for first, _ in parameters.collocations}
        self._decided: dict[str, bool] = {}

    def split(self, text: str) -> list[str]:
        """The sentences of `text`, without those that are empty."""
        return [text[begin:end] for begin, end in self._with_closing_quotes(text) if begin < end]

    def _with_closing_quotes(self, text: str) -> Iterator[tuple[int, int]]:
        """Sentences after quotes and brackets that open the next one are given to the one they close."""
        spans = list(self._spans(text))
        moved = 0
        for i, (begin, end) in enumerate(spans):
            begin += moved
            moved = 0
            if i + 1 < len(spans):
                next_begin, next_end = spans[i + 1]
                may_move = text[next_begin : next_begin + 1] in _CLOSING_QUOTES
                if may_move and (match := _AFTER_A_SENTENCE.match(text[next_begin:next_end])):
                    end = next_begin + len(match.group().rstrip())
                    moved = match.end()
            yield begin, end

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for match, context in self._last_of_each_word(text):
            if context is None or self._has_boundary(context):
                yield start, match.end()
                start = match.start("next") if match.group("next") else match.end()
        yield start, max(start, len(text.rstrip()))

    def _last_of_each_word(self, text: str) -> Iterator[tuple[re.Match[str], str | None]]:
        """The last possible end in each word, with the word and what follows it; None: it is an end for sure."""
        word = (0, 0)
        pending: re.Match[str] | None = None
        for match in self._possible_end.finditer(text):
            end = match.start()
            plain = self._plain_word(text, word[1], match)
            space = end - plain - 1 if plain else _last_space(text, word[1], end)
            begin = space + 1 if space > word[1] else word[0]
            if pending is not None and word[1] <= begin:
                yield pending, text[word[0] : word[1]] + pending.group() + pending.group("after")
            pending, word = match, (begin, end)
            if plain:
                yield match, None
                pending = None
        if pending is not None:
            yield pending, text[word[0] : word[1]] + pending.group() + pending.group("after")

    def _plain_word(self, text: str, start: int, match: re.Match[str]) -> int:
        """Length of the word before a possible end, if it is one that no rule takes exception to; else 0.

        Such a word stands between white spaces, has two or more letters and nothing else, and is neither an
        abbreviation nor one that some word goes with. Half of all sentences end so.
        """
        end = match.start()
        if self.keep_newlines or match.group("next") is None:
            return 0
        before = text[max(start, end - _LONGEST_PLAIN_WORD) : end]
        word = before.rpartition(" ")[2].rpartition("\n")[2]
        is_plain = 1 < len(word) < len(before) and word.isalpha() and word.isascii()
        return len(word) if is_plain and word.lower() not in self._doubtful else 0

    def _has_boundary(self, context: str) -> bool:
        if (decided := self._decided.get(context)) is not None:
            return decided
        tokens = [token for line in context.split("\n") for token in _TOKEN.findall(line)]
        decided = any(self._ends_sentence(token, following) for token, following in zip(tokens, tokens[1:]))
        if len(context) < _LONGEST_REMEMBERED:
            if len(self._decided) == _MOST_REMEMBERED:
                self._decided.clear()
            self._decided[context] = decided
        return decided

    def _ends_sentence(self, token: str, following: str) -> bool:
        if token in ("?", "!"):
            return True
        if not token.endswith(".") or self._is_collocation(token, following):
            return False
        if _INITIAL.match(token):
            return not self._is_abbreviation(token) and not self._goes_on_after_initial(following)
        if _ELLIPSIS.match(token) or self._is_abbreviation(token):
            return self._starts_sentence(following) is True or self._is_frequent_start(following)
        if _kind_of(token) == "##number##":
            return self._starts_sentence(following) is not False
        return not token.endswith("..")

    def _is_collocation(self, token: str, following: str) -> bool:
        kind = _kind_of(token)
        kind = kind[:-1] if len(kind) > 1 and kind.endswith(".") else kind
        return (kind, self._plain_kind(following)) in self.parameters.collocations

    def _is_abbreviation(self, token: str) -> bool:
        if token.endswith(".."):
            return False
        word = token[:-1].lower()
        return word in self.parameters.abbreviations or word.split("-")[-1] in self.parameters.abbreviations

    def _goes_on_after_initial(self, following: str) -> bool:
        starts = self._starts_sentence(following)
        if starts is None and following[0].isupper():  # a name, unless it is known as a word in small letters
            return not self.parameters.orthography.get(self._plain_kind(following), 0) & _ANY_LOWER
        return starts is False

    def _is_frequent_start(self, word: str) -> bool:
        return word[0].isupper() and self._plain_kind(word) in self.parameters.sentence_starters

    def _starts_sentence(self, word: str) -> bool | None:
        """Whether the spelling of a word says that a sentence begins with it; None: it says nothing."""
        if word in _PUNCTUATION:
            return False
        seen = self.parameters.orthography.get(self._plain_kind(word), 0)
        if word[0].isupper() and seen & _ANY_LOWER and not seen & _MID_UPPER:
            return True
        if word[0].islower() and (seen & _ANY_UPPER or not seen & _BEGIN_LOWER):
            return False
        return None

    def _plain_kind(self, token: str) -> str:
        """The word without the full stop that ends a sentence; one of an abbreviation stays."""
        kind = _kind_of(token)
        if len(kind) > 1 and kind.endswith(".") and not token.endswith("..") and not self._is_abbreviation(token):
            return kind[:-1]
        return kind


def _kind_of(token: str) -> str:
    """A word in small letters; all numbers are alike."""
    return _NUMBER.sub("##number##", token.lower())


def _last_space(text: str, begin: int, end: int) -> int:
    """Position of the last white space in text[begin:end], -1 if there is none."""
    for position in range(end - 1, begin - 1, -1):
        if text[position].isspace():
            return position
    return -1


def read_parameters(folder: Path) -> PunktParameters:
    """The files of NLTK's `punkt_tab/<language>`."""
    try:
        pairs = [tuple(line.split("\t")) for line in _lines(folder / "collocations.tab")]
        spellings = (line.split("\t") for line in _lines(folder / "ortho_context.tab"))
        return PunktParameters(
            frozenset(_lines(folder / "abbrev_types.txt")),
            frozenset((first, second) for first, second in pairs),
            frozenset(_lines(folder / "sent_starters.txt")),
            {word: int(bits) for word, bits in spellings},
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no parameters of Punkt: {error}") from None


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def find_parameters(language: str) -> Path | None:
    """Where NLTK keeps `punkt_tab/<language>`, as the environment and its usual folders say; None: nowhere."""
    given = [Path(folder) for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    usual = [Path.home() / "nltk_data", *(Path(sys.prefix) / part / "nltk_data" for part in ("", "share", "lib"))]
    system = [Path(folder) / "nltk_data" for folder in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    for folder in [*given, *usual, *system]:
        found = folder / "tokenizers" / "punkt_tab" / language
        if found.is_dir():
            return found
    return None


BUILT_IN = Path(__file__).with_name("punkt_english.json")
"""Parameters learned from public-domain English, for where NLTK's are not at hand."""


def built_in_parameters() -> PunktParameters:
    """English."""
    content = json.loads(BUILT_IN.read_text(encoding="utf-8"))
    spellings = {word: int(bits) for bits, words in content["orthography"].items() for word in words.split(" ")}
    return PunktParameters(
        frozenset(content["abbreviations"]),
        frozenset((first, second) for first, second in content["collocations"]),
        frozenset(content["sentence_starters"]),
        spellings,
    )
