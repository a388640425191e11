"""Questions and the passages that answer them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.training.settings import ConfigurationError
from tasks.retrieval.questions import MATCHES, Question, first_right, has_match, has_words, read_questions


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "nq.tsv"
    path.write_text("who hunts the whale\t['Ahab', 'Captain \"Ahab\"']\nwhen\t[\"1851\"]\n")
    assert read_questions(path, "F") == [
        Question("who hunts the whale", ["Ahab", 'Captain "Ahab"']),
        Question("when", ["1851"]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no questions"),
        ("who\n", "line 1: a question, a tab and its answers are expected, found 1"),
        ("who\tAhab\n", r"line 1: answers are a list such as .*, found Ahab"),
        ("who\t[]\n", "line 1: answers are a list"),
        ("who\t__import__('os').system('touch harmed')\n", "line 1: answers are a list"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_questions(path, "F")
    with pytest.raises(ConfigurationError, match="no such file"):
        read_questions(tmp_path / "y.tsv", "F")


def test_answers_are_words_that_follow_each_other() -> None:
    passage = "Call me Ishmaël. Some years ago -- never mind how long."
    assert has_words("ISHMAËL", passage) and has_words("years ago", passage) and has_words("ishmae\u0308l.", passage)
    assert not has_words("year", passage) and not has_words("ago years", passage) and not has_words(" ", passage)


def test_answers_are_patterns() -> None:
    assert has_match(r"some \w+ ago", "Call me. Some years ago") and not has_match("^years", "some years")
    assert not has_match("(", "(")


def test_the_first_passage_with_any_answer_counts() -> None:
    question, passages = Question("who", ["Ahab", "Starbuck"]), ["a ship", "Starbuck spoke", "Ahab"]
    assert first_right(question, passages, MATCHES["string"]) == 1
    assert first_right(Question("who", ["Pip"]), passages, MATCHES["regex"]) == 3
