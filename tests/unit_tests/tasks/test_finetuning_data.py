"""How labelled texts become tokens, and in which order they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.training.settings import ConfigurationError
from tasks.files import matching
from tasks.finetuning.corpora import CORPORA, clean, filled_in, read_mnli, read_qqp, read_race, short_name
from tasks.finetuning.examples import NO_LABEL, Epochs, Example, PairEncoder, Repeated, batches_per_epoch


class Letters:
    """A token for each letter, its code."""

    cls, sep, pad = 1, 2, 0

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def encoded(first: str, second: str, length: int, most_first: int | None = None) -> tuple[list[int], list[int], int]:
    row = PairEncoder(Letters(), length, most_first)(Example(7, ((first, second),), 1))
    assert row["uid"].item() == 7 and row["label"].item() == 1
    return row["text"].tolist(), row["types"].tolist(), int(row["padding_mask"].sum())


@pytest.mark.parametrize(
    ("first", "second", "length", "most_first", "expected"),
    [
        ("ab", "c", 8, None, ([1, 97, 98, 2, 99, 2, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], 6)),
        ("ab", "cdef", 6, None, ([1, 97, 98, 2, 99, 2], [0, 0, 0, 0, 1, 1], 6)),  # the second loses its end
        ("abcdef", "gh", 5, None, ([1, 97, 98, 99, 2], [0, 0, 0, 0, 0], 5)),  # nothing of it is left
        ("abcdef", "gh", 8, 3, ([1, 97, 98, 99, 2, 103, 104, 2], [0, 0, 0, 0, 0, 1, 1, 1], 8)),
    ],
)
def test_pairs_are_cut_and_padded(
    first: str, second: str, length: int, most_first: int | None, expected: tuple[list[int], list[int], int]
) -> None:
    assert encoded(first, second, length, most_first) == expected


def test_several_choices_are_rows() -> None:
    row = PairEncoder(Letters(), 8)(Example(0, (("a", "b"), ("c", "d"), ("e", "f")), 2))
    assert row["text"].shape == row["types"].shape == row["padding_mask"].shape == (3, 8)
    assert row["text"][2].tolist() == [1, 101, 2, 102, 2, 0, 0, 0]


EXAMPLES = [Example(uid, (("a", "b"),), uid % 2) for uid in range(11)]


@pytest.mark.parametrize(("keep_last", "batches"), [(False, 2), (True, 3)])
def test_an_epoch_has_every_example_once(keep_last: bool, batches: int) -> None:
    assert batches_per_epoch(11, 4, keep_last) == batches
    data = Epochs(EXAMPLES, PairEncoder(Letters(), 8), epochs=3, batch_size=4, keep_last=keep_last, seed=5)
    assert len(data) == 3 * batches * 4
    rows = [data[i] for i in range(len(data))]
    epochs = [rows[begin : begin + batches * 4] for begin in range(0, len(rows), batches * 4)]
    orders = [[row["uid"].item() for row in epoch if row["label"] != NO_LABEL] for epoch in epochs]
    assert all(len(set(order)) == len(order) == (11 if keep_last else 8) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert torch.equal(data[2]["uid"], rows[2]["uid"])  # whatever was read before


def test_validation_starts_again() -> None:
    data = Repeated(EXAMPLES, PairEncoder(Letters(), 8), 25)
    assert [data[i]["uid"].item() for i in (0, 10, 11, 24)] == [0, 10, 0, 2] and len(data) == 25


# --- files ----------------------------------------------------------------------------------------


def test_texts_are_cleaned() -> None:
    assert clean("  one . two\n three  . four .") == "one. two three. four ."
    assert filled_in("It is _ and _", "big") == "It is big and big"


def test_mnli(tmp_path: Path) -> None:
    path = tmp_path / "MNLI" / "dev_matched.tsv"
    path.parent.mkdir()
    columns = [f"c{i}" for i in range(12)]
    row = ["3", *"xxxxxxx", "A man . He", 'is "here', "x", "neutral"]
    path.write_text("\n".join("\t".join(line) for line in (columns, row)) + "\n")
    assert read_mnli(path, "F") == [Example(3, (("A man. He", 'is "here'),), 2)]
    assert short_name(path, "MNLI") == "dev-matched"
    path.write_text("\t".join(columns) + "\n" + "\t".join([*row[:-1], "maybe"]))
    with pytest.raises(ConfigurationError, match="F, line 2: the label is 'maybe'; it can be contradiction"):
        read_mnli(path, "F")
    path.write_text("\t".join(columns) + "\n" + "\t".join(row[:-2]))
    with pytest.raises(ConfigurationError, match="12 columns are expected, found 10"):
        read_mnli(path, "F")


def test_qqp_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("id\tquestion1\tquestion2\n0\tWhy?\tHow?\n")
    assert read_qqp(path, "F") == [Example(0, (("Why?", "How?"),), NO_LABEL)]


def test_race(tmp_path: Path) -> None:
    entry = {"article": "Long ago .", "questions": ["Who _ ?"], "options": [["a", "b", "c", "d"]], "answers": ["C"]}
    (tmp_path / "1.txt").write_text(json.dumps(entry))
    (tmp_path / "2.txt").write_text(json.dumps(entry) + "\n")
    first, second = read_race(tmp_path, "F")
    assert (first.uid, second.uid, first.label) == (0, 1, 2)
    assert first.pairs[1] == ("Who b ?", "Long ago .")
    for change, message in (
        ({"answers": ["E"]}, "question 1: the label is 'E'"),
        ({"options": [["a", "b"]]}, "has 2 options, not 4"),
        ({"answers": []}, "1 questions, 1 lists of options and 0 answers"),
    ):
        (tmp_path / "1.txt").write_text(json.dumps(entry | change))
        with pytest.raises(ConfigurationError, match=message):
            read_race(tmp_path, "F")
    (tmp_path / "1.txt").write_text(json.dumps({"article": ""}))
    with pytest.raises(ConfigurationError, match="questions, options, answers missing"):
        read_race(tmp_path, "F")


def test_paths(tmp_path: Path) -> None:
    for name in ("b.tsv", "a.tsv"):
        (tmp_path / name).touch()
    assert [path.name for path in matching(f"{tmp_path}/*.tsv", "--valid-data")] == ["a.tsv", "b.tsv"]
    for word in (f"{tmp_path}/*.txt", f"{tmp_path}/c.tsv"):
        with pytest.raises(ConfigurationError, match="--valid-data .*: there is no such file"):
            matching(word, "--valid-data")


def test_race_reads_more_of_the_choice_than_of_the_article() -> None:
    assert CORPORA["RACE"].most_first == 128 and CORPORA["RACE"].num_choices == 4
