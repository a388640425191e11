"""Finding the files of a task before anything else is done."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from megatron.training.settings import refuse_unless


def matching(word: str, flag: str) -> list[Path]:
    """The files or directories that a path, perhaps with wildcards, names, in order.

    Raises:
        ConfigurationError: there are none.
    """
    found = sorted(glob.glob(word)) if glob.has_magic(word) and not Path(word).exists() else [word]
    refuse_unless(found and all(Path(path).exists() for path in found), f"{flag} {word}: there is no such file")
    return [Path(path) for path in found]


def one_file(words: Sequence[str] | None, flag: str) -> Path:
    """The file that the words of a flag name.

    Raises:
        ConfigurationError: not exactly one.
    """
    refuse_unless(words, f"{flag} is missing: the file to evaluate on")
    found = [path for word in words or () for path in matching(word, flag)]
    refuse_unless(len(found) == 1, f"{flag} {' '.join(words or ())}: this task reads one file, found {len(found)}")
    refuse_unless(found[0].is_file(), f"{flag} {found[0]}: this task reads a file, found a directory")
    return found[0]
