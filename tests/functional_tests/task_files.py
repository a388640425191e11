"""Small MNLI, QQP and RACE files of real words, whose labels follow rules that can be learned."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

from tests.functional_tests.sentences import BOOK

MNLI_WORDS = {"contradiction": "not", "entailment": "all", "neutral": "may"}


def phrases(number: int, num_words: int = 6) -> list[str]:
    """Pieces of a book, of its common words: a small vocabulary has a token for each."""
    with gzip.open(BOOK, "rt", encoding="utf-8") as book:
        words = re.findall(r"[a-z]+", book.read(400_000).lower())
    common = {word for word, _ in Counter(words).most_common(150)} - {*MNLI_WORDS.values(), "whale"}
    words = [word for word in words if word in common]
    return [" ".join(words[i * num_words : (i + 1) * num_words]) for i in range(number)]


def write_mnli(path: Path, number: int, *, columns: int = 12, seed: int = 0) -> None:
    """The label follows from the first word of the second text; ten columns are the format without labels."""
    draw, lines = random.Random(seed), ["\t".join(f"column{i}" for i in range(columns))]
    texts = phrases(2 * number)
    for uid in range(number):
        label = draw.choice(list(MNLI_WORDS))
        second = texts[2 * uid + 1].split()
        second.insert(0, MNLI_WORDS[label])
        row = ["x"] * columns
        row[0], row[8], row[9] = str(uid), texts[2 * uid], " ".join(second)
        if columns > 10:
            row[-1] = label
        lines.append("\t".join(row))
    path.write_text("\n".join(lines) + "\n")


def write_qqp(path: Path, number: int, *, seed: int = 0) -> None:
    """Duplicates are about a whale. One line is broken, as some of the published file are."""
    draw, lines = random.Random(seed), ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
    texts = phrases(2 * number)
    for uid in range(number):
        label = draw.randrange(2)
        second = texts[2 * uid + 1] + (" whale ?" if label else " ?")
        lines.append(f"{uid}\t{uid}\t{uid}\t{texts[2 * uid]} ?\t{second}\t{label}")
    lines.insert(3, "77\t1\t2\tonly one question")
    path.write_text("\n".join(lines) + "\n")


def write_race(folder: Path, number: int, *, seed: int = 0) -> None:
    """The right choice has the whale in it; articles are longer than the model can read."""
    draw, texts = random.Random(seed), phrases(number * 9)
    folder.mkdir(parents=True)
    for article in range(number // 2):
        questions, options, answers = [], [], []
        for place in range(2):
            own = texts[(2 * article + place) * 9 :][:5]
            right = draw.randrange(4)
            choices = [" ".join(text.split()[:3]) for text in own[:4]]
            choices[right] = f"the whale {choices[right]}"
            questions.append(f"{' '.join(own[4].split()[:2])} _ ." if place else f"{own[4]} ?")
            options.append(choices)
            answers.append("ABCD"[right])
        entry = {"article": " . ".join(texts[article * 9 :][:12]), "questions": questions, "options": options}
        (folder / f"{article}.txt").write_text(json.dumps(entry | {"answers": answers, "id": f"{article}.txt"}) + "\n")
