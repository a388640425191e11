"""The files of MNLI, QQP and RACE, as these corpora are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.training.settings import ConfigurationError, refuse_unless
from megatron.training.utils import warn_rank_0
from tasks.finetuning.examples import NO_LABEL, Example

MNLI_LABELS = {"contradiction": 0, "entailment": 1, "neutral": 2}
QQP_LABELS = {"0": 0, "1": 1}
CHOICES = 4


@dataclass(frozen=True)
class Corpus:
    """A corpus on which a BERT can be finetuned."""

    name: str
    num_classes: int
    read: Callable[[Path, str], list[Example]]
    """(path, how to name it in messages) -> its examples. Raises `ConfigurationError` for a file of another format."""
    num_choices: int = 1
    most_first: int | None = None
    """Tokens of the first text of a pair, at most."""


def clean(text: str) -> str:
    """One line, one space between words, none before a full stop."""
    text = " ".join(text.split())
    for _ in range(3):
        text = text.replace(" . ", ". ")
    return text


# --- GLUE: tab-separated tables with a header -----------------------------------------------------


def read_mnli(path: Path, where: str) -> list[Example]:
    """Columns: 0 the id, 8 and 9 the texts, the last the label; with ten columns in the header there are no labels."""
    header, *rows = _table(path, where)
    refuse_unless(
        len(header) >= 10, f"{where}: MNLI has at least 10 columns separated by tabs, the header has {len(header)}"
    )
    labelled = len(header) > 10
    return [_mnli_row(row, len(header), labelled, f"{where}, line {number}") for number, row in enumerate(rows, 2)]


def _mnli_row(row: list[str], num_columns: int, labelled: bool, where: str) -> Example:
    refuse_unless(len(row) == num_columns, f"{where}: {num_columns} columns are expected, found {len(row)}")
    label = _label(row[-1], MNLI_LABELS, where) if labelled else NO_LABEL
    return _pair(row[0], row[8], row[9], label, where)


def read_qqp(path: Path, where: str) -> list[Example]:
    """Columns: 0 the id, 3 and 4 the questions, 5 the label; with three columns, id and questions, there are no labels.

    Lines of other shapes, of which the published file has a few, are left out.
    """
    header, *rows = _table(path, where)
    refuse_unless(
        len(header) in (3, 6), f"{where}: QQP has 6 columns separated by tabs, or 3 without labels; found {len(header)}"
    )
    labelled, examples = len(header) == 6, []
    first = 3 if labelled else 1
    for number, row in enumerate(rows, 2):
        if len(row) == len(header) and row[first].strip() and row[first + 1].strip():
            place = f"{where}, line {number}"
            label = _label(row[5], QQP_LABELS, place) if labelled else NO_LABEL
            examples.append(_pair(row[0], row[first], row[first + 1], label, place))
    if len(examples) < len(rows):
        warn_rank_0(f"{where}: {len(rows) - len(examples)} of {len(rows)} lines are not whole and are left out")
    return examples


def _table(path: Path, where: str) -> list[list[str]]:
    refuse_unless(path.is_file(), f"{where}: a file is expected, not a folder")
    lines = [line for line in _read(path, where).split("\n") if line.strip()]
    refuse_unless(len(lines) > 1, f"{where}: a header and at least one line are expected, found {len(lines)}")
    return [line.rstrip("\r").split("\t") for line in lines]


def _pair(uid: str, first: str, second: str, label: int, where: str) -> Example:
    refuse_unless(uid.strip().isdigit(), f"{where}: the first column is a number, found {uid!r}")
    return Example(int(uid), ((clean(first), clean(second)),), label)


def _label(word: str, labels: dict[str, int], where: str) -> int:
    refuse_unless(word.strip() in labels, f"{where}: the label is {word.strip()!r}; it can be {', '.join(labels)}")
    return labels[word.strip()]


# --- RACE: folders of files with one JSON object a line -------------------------------------------


def read_race(path: Path, where: str) -> list[Example]:
    """Each object has an `article`, `questions`, their four `options` and `answers` A to D."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    refuse_unless(files, f"{where}: there are no .txt files in this folder")
    examples: list[Example] = []
    for file in files:
        for number, line in enumerate(_read(file, where).split("\n"), 1):
            if line.strip():
                examples += _race_article(line, f"{where}: {file.name}, line {number}", len(examples))
    refuse_unless(examples, f"{where}: there are no questions in it")
    return examples


def _race_article(line: str, where: str, first_uid: int) -> Iterator[Example]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where}: no JSON ({error})") from None
    names = ("article", "questions", "options", "answers")
    missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
    refuse_unless(not missing, f"{where}: {', '.join(missing)} missing; RACE has objects with {', '.join(names)}")
    questions, options, answers = entry["questions"], entry["options"], entry["answers"]
    refuse_unless(
        len(questions) == len(options) == len(answers),
        f"{where}: {len(questions)} questions, {len(options)} lists of options and {len(answers)} answers",
    )
    article = clean(entry["article"])
    for place, (question, choices, answer) in enumerate(zip(questions, options, answers)):
        refuse_unless(
            len(choices) == CHOICES, f"{where}: question {place + 1} has {len(choices)} options, not {CHOICES}"
        )
        label = _label(answer, {letter: i for i, letter in enumerate("ABCD")}, f"{where}, question {place + 1}")
        yield Example(first_uid + place, tuple((filled_in(question, choice), article) for choice in choices), label)


def filled_in(question: str, choice: str) -> str:
    """The choice in the question's blanks, or behind the question.

    >>> filled_in("The cat _ .", "sleeps"), filled_in("What does it do?", "It sleeps")
    ('The cat sleeps .', 'What does it do? It sleeps')
    """
    return clean(question.replace("_", choice) if "_" in question else f"{question} {choice}")


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{where}: {path.name} is no UTF-8 text ({error})") from None


CORPORA: dict[str, Corpus] = {
    "MNLI": Corpus("MNLI", len(MNLI_LABELS), read_mnli),
    "QQP": Corpus("QQP", len(QQP_LABELS), read_qqp),
    "RACE": Corpus("RACE", CHOICES, read_race, num_choices=CHOICES, most_first=128),
}


def short_name(path: Path, corpus: str) -> str:
    """What stands behind the corpus' name in a path, else the last part of it.

    >>> short_name(Path("data/glue_data/MNLI/dev_matched.tsv"), "MNLI"), short_name(Path("RACE/dev/high"), "RACE")
    ('dev-matched', 'dev-high')
    """
    text: Any = path.with_suffix("").as_posix()
    rest = text.rpartition(f"{corpus}/")[2] if f"{corpus}/" in text else path.stem
    return rest.strip("/").replace("/", "-").replace("_", "-")
