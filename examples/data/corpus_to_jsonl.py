"""Write the corpus beside this file as JSON lines, one `{"title", "text"}` object per document.

Usage: python examples/data/corpus_to_jsonl.py OUT.jsonl
"""

import gzip
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("moby_dick.txt.gz", "state_of_the_union_1790_1860.txt.gz")
TITLE = "=== "


def read_documents(path: Path) -> Iterator[dict[str, str]]:
    """The documents of one corpus file: each starts at a line that begins with `=== `."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    for chapter in text.removeprefix(TITLE).split("\n" + TITLE):
        title, _, body = chapter.partition("\n")
        yield {"title": title.strip(), "text": f"{title.strip()}\n\n{body.strip()}"}


def main(output: Path) -> None:
    documents = [document for name in FILES for document in read_documents(HERE / name)]
    # A contiguous `--split` of an unshuffled list would validate on late presidents alone.
    random.Random(1234).shuffle(documents)
    unfinished = output.with_name(output.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    os.replace(unfinished, output)
    characters = sum(len(document["text"]) for document in documents)
    print(f"{output}: {len(documents)} documents, {characters:,} characters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
