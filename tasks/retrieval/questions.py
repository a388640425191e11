"""Questions with their answers, and whether a passage has one of them."""

from __future__ import annotations

import ast
import csv
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.training.settings import ConfigurationError, refuse_unless

_WORD = re.compile(r"[\w]+|[^\w\s]")


@dataclass(frozen=True)
class Question:
    """What is asked, and what would be right."""

    text: str
    answers: Sequence[str]


def read_questions(path: Path, flag: str) -> list[Question]:
    """The questions of a file with a line `question, tab, list of answers as Python writes it` for each.

    Raises:
        ConfigurationError: the file is missing or something else.
    """
    refuse_unless(path.is_file(), f"{flag} {path}: there is no such file")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    refuse_unless(rows, f"{flag} {path}: there are no questions in it")
    return [_question(row, f"{flag} {path}, line {number}") for number, row in enumerate(rows, 1)]


def _question(row: list[str], where: str) -> Question:
    refuse_unless(len(row) == 2, f"{where}: a question, a tab and its answers are expected, found {len(row)} columns")
    try:
        answers = ast.literal_eval(row[1])
    except (ValueError, SyntaxError):
        answers = None
    is_list = isinstance(answers, list) and bool(answers) and all(isinstance(answer, str) for answer in answers)
    if not is_list:
        raise ConfigurationError(f"{where}: answers are a list such as ['1851', 'in 1851'], found {row[1][:80]}")
    return Question(row[0].strip(), answers)


def words_of(text: str) -> list[str]:
    """Words and signs in small letters, accents apart from their letters."""
    return _WORD.findall(unicodedata.normalize("NFD", text).lower())


def has_words(answer: str, passage: str) -> bool:
    """Whether the words of the answer stand in the passage one after the other.

    >>> has_words("New York", "in new-york."), has_words("New York", "In old and new York.")
    (False, True)
    """
    wanted, found = words_of(answer), words_of(passage)
    return bool(wanted) and any(
        found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1) if found[i] == wanted[0]
    )


def has_match(answer: str, passage: str) -> bool:
    """Whether the answer, a regular expression, is found in the passage; one that is none is not."""
    try:
        pattern = re.compile(unicodedata.normalize("NFD", answer), re.IGNORECASE | re.MULTILINE)
    except re.error:
        return False
    return pattern.search(unicodedata.normalize("NFD", passage)) is not None


MATCHES: dict[str, Callable[[str, str], bool]] = {"string": has_words, "regex": has_match}
"""`--faiss-match` -> (answer, passage) -> whether it is there."""


def first_right(question: Question, passages: Sequence[str], match: Callable[[str, str], bool]) -> int:
    """Place of the first passage that has an answer; how many there are if none has."""
    for place, passage in enumerate(passages):
        if any(match(answer, passage) for answer in question.answers):
            return place
    return len(passages)
