"""A whole run of preprocessing: partitions, one after another or as tasks of their own, and their merge.

Each step depends on nothing but the settings and the files that earlier steps left, so that any scheduler can run the
partitions of one data set on as many machines as there are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core.datasets.index_file import get_bin_path, get_idx_path
from megatron.training.datasets.encoding import DocumentEncoder
from megatron.training.datasets.input_files import STANDARD_INPUT, InputFiles
from megatron.training.datasets.partitions import InputNames, assign_files, read_json, write_json, write_partitions
from megatron.training.datasets.preprocessing import Counts, Output, merge, preprocess, remove_partial
from megatron.training.datasets.punkt import (
    PunktSplitter,
    built_in_parameters,
    find_parameters,
    read_parameters,
)
from megatron.training.tokenizer import build_tokenizer

Say = Callable[[str], None]


def say_on_stderr(message: str) -> None:
    """Progress does not go where data may go."""
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Sentences:
    """How text is cut into sentences."""

    language: str
    keep_newlines: bool
    folder: Path | None
    """Parameters of NLTK; None: the built-in ones."""

    @classmethod
    def find(cls, language: str, keep_newlines: bool) -> Sentences:
        """ValueError: nothing is known of the language."""
        folder = find_parameters(language)
        if folder is None and language != "english":
            raise ValueError(
                f"--lang {language}: no folder tokenizers/punkt_tab/{language} under $NLTK_DATA or where NLTK looks "
                "(python -m nltk.downloader punkt_tab fetches it); only english is built in"
            )
        return cls(language, keep_newlines, folder)

    def splitter(self) -> PunktSplitter:
        """What does it."""
        parameters = built_in_parameters() if self.folder is None else read_parameters(self.folder)
        return PunktSplitter(parameters, self.keep_newlines)


class PreprocessRun:
    """The steps that a command line stands for.

    Args:
        args: as `tools/preprocess_data.py` parses it.
    """

    def __init__(self, args: argparse.Namespace, say: Say = say_on_stderr) -> None:
        self.args = args
        self.say = say
        self.names = InputNames.of(args.input, args.output_prefix, args.partitions)
        self.level = "sentence" if args.split_sentences else "document"
        self.sentences = Sentences.find(args.lang, args.keep_newlines) if args.split_sentences else None
        if self.sentences is not None and self.sentences.folder is None:
            say("no punkt_tab/english of NLTK was found: using the built-in rules for English sentences")

    @cached_property
    def tokenizer(self) -> Any:
        """Made once, when the first documents are to be tokenized."""
        return build_tokenizer(self.args)

    def run(self) -> None:
        """All steps, or the one that --only names."""
        only = self.args.only
        if self.args.partitions == 1:
            self.report([self.encode(0)])
            return
        if only in (None, "split"):
            self.split()
        if only is None:
            self.report(self.encode_all())
        elif only.isdecimal():
            self.report([self.encode(int(only))])
        if only in (None, "merge"):
            self.merge()

    def encode_all(self) -> list[Counts]:
        """Every partition, here or on a Ray cluster."""
        if self.args.ray_address:
            return encode_on_ray(self.args)
        return [self.encode(i) for i in range(self.args.partitions)]

    def split(self) -> None:
        """Write the partitions' lines to files, unless whole files are dealt out."""
        if self.args.partition_by == "files":
            return
        prefix = self.args.output_prefix
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        files = InputFiles(self.args.input, self.args.json_keys, scratch=f"{prefix}_scratch_split")
        if write_partitions(files, self.names, self.args.keep_sequential_samples) == "found":
            first, last = self.names.partition(0), self.names.partition(self.args.partitions - 1)
            self.say(f"using the partitions {first} to {last} as they are")

    def encode(self, index: int) -> Counts:
        """Tokenize one partition (with one partition: everything), unless --resume finds that it was done."""
        output = self.output(index)
        files = self.files(index)
        is_split = self._has_sentences(files, index)
        if is_split:
            self.say(f"using the sentences in {self.names.sentences(index)} as they are")
            files = InputFiles(str(self.names.sentences(index)), self.args.json_keys, output.scratch)
        settings = self.settings(files, is_split) if self.keeps_records else None
        if self.args.resume and (done := done_before(output, settings)):
            self.say(f"{output.prefix}: {done.documents} documents were done before")
            remove_partial(output)
            return done
        split_copy = None if is_split or self.sentences is None else self._split_copy(index)
        output = Output(output.prefix, output.keys, output.level, split_copy)
        encoder = self.encoder(output, splits=not is_split)
        counts = preprocess(files, output, encoder, self.args.workers, self.args.log_interval)
        if settings is not None:
            write_record(output, settings, counts)
        return counts

    def merge(self) -> None:
        """Join the partitions under the final names."""
        parts = [self.output(i) for i in range(self.args.partitions)]
        missing = [part.prefix for part in parts if not all(map(is_dataset, part.datasets()))]
        if missing:
            raise ValueError(f"{len(missing)} partitions are not finished: {', '.join(missing[:10])}")
        output = Output(self.args.output_prefix, tuple(self.args.json_keys), self.level)
        merge(parts, output, self.encoder(output, splits=False, lists_bad_lines=False))

    def output(self, index: int) -> Output:
        """Where the token files of a partition go."""
        prefix = self.args.output_prefix
        prefix = prefix if self.args.partitions == 1 else f"{prefix}_{index}"
        return Output(prefix, tuple(self.args.json_keys), self.level)

    def files(self, index: int) -> InputFiles:
        """The lines of a partition."""
        args = self.args
        paths: list[str] = args.input
        if args.partitions > 1 and args.partition_by == "files":
            paths = assign_files(InputFiles(paths).paths, args.partitions, args.keep_sequential_samples)[index]
        elif args.partitions > 1:
            paths = [str(self.names.partition(index))]
        return InputFiles(paths, args.json_keys, self.output(index).scratch)

    def encoder(self, output: Output, splits: bool, lists_bad_lines: bool = True) -> DocumentEncoder:
        """What tokenizes."""
        return DocumentEncoder(
            self.tokenizer,
            self.args.json_keys,
            self.args.append_eod,
            split=self.sentences.splitter().split if self.sentences is not None and splits else None,
            keep_split_lines=output.split_copy is not None,
            skip_bad_lines=self.args.skip_bad_lines and lists_bad_lines,
            scratch=output.scratch,
        )

    @property
    def keeps_records(self) -> bool:
        """Whether --resume may ask later what was done."""
        return self.args.resume or self.args.partitions > 1

    def settings(self, files: InputFiles, is_split: bool) -> dict[str, Any]:
        """All that the result depends on."""
        sentences = self.sentences if not is_split else None
        return {
            "inputs": [_identity(path) for path in files.paths],
            "keys": self.args.json_keys,
            "append_eod": self.args.append_eod,
            "skip_bad_lines": self.args.skip_bad_lines,
            "sentences": None
            if sentences is None
            else [sentences.language, sentences.keep_newlines, str(sentences.folder)],
            "tokenizer": dict(self.tokenizer.unique_identifiers),
            "tokenizer_files": [_digest(path) for path in self.tokenizer.unique_identifiers["tokenizer_path"] if path],
        }

    def report(self, counts: list[Counts]) -> None:
        """Say how many lines were left out, and which."""
        bad = [(self.output(i).bad_lines, found.bad_lines) for i, found in enumerate(counts) if found.bad_lines]
        if self.args.only is not None and self.args.only.isdecimal():
            bad = [(self.output(int(self.args.only)).bad_lines, found.bad_lines) for found in counts if found.bad_lines]
        for path, number in bad:
            self.say(f"{number} lines were left out, as {path} lists:")
            with open(path, encoding="utf-8") as file:
                for line in list(zip(range(_SHOWN_LINES), file)):
                    self.say(f"  {line[1].rstrip()}")
            if number > _SHOWN_LINES:
                self.say("  ...")

    def _has_sentences(self, files: InputFiles, index: int) -> bool:
        path = self.names.sentences(index)
        return self.sentences is not None and path.is_file() and path.stat().st_mtime > files.newest()

    def _split_copy(self, index: int) -> Path | None:
        path = self.names.sentences(index)
        if os.access(path.parent, os.W_OK):
            return path
        self.say(f"{path} is not written: the folder is write-protected")
        return None


_SHOWN_LINES = 10


def is_dataset(prefix: str) -> bool:
    """Whether both token files are there."""
    return os.path.isfile(get_bin_path(prefix)) and os.path.isfile(get_idx_path(prefix))


def record_of(output: Output) -> Path:
    """Where it is written down that an output is complete, and what it was made from."""
    return Path(f"{output.prefix}_{output.level}.done.json")


def write_record(output: Output, settings: dict[str, Any], counts: Counts) -> None:
    """Write down that an output is complete."""
    content = {
        "settings": settings,
        "files": _sizes(output),
        "documents": counts.documents,
        "bad_lines": counts.bad_lines,
    }
    write_json(record_of(output), content)


def done_before(output: Output, settings: dict[str, Any] | None) -> Counts | None:
    """What an earlier run with the same settings and input did, if its files are there as it left them."""
    record = read_json(record_of(output))
    if not isinstance(record, dict) or record.get("settings") != settings:
        return None
    if not all(map(is_dataset, output.datasets())) or record.get("files") != _sizes(output):
        return None
    return Counts(record["documents"], record["bad_lines"])


def _sizes(output: Output) -> dict[str, int]:
    paths = [path(prefix) for prefix in output.datasets() for path in (get_bin_path, get_idx_path)]
    return {os.path.basename(path): os.path.getsize(path) for path in paths}


def _identity(path: str) -> list[Any]:
    if path == STANDARD_INPUT:
        return [path]
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _digest(path: str) -> str:
    """Of a file's content; a folder or a name on the hub stands for itself."""
    if not os.path.isfile(path):
        return path
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def encode_partition(args: argparse.Namespace, index: int) -> Counts:
    """Tokenize one partition, in a process of its own somewhere."""
    return PreprocessRun(args).encode(index)


def encode_on_ray(args: argparse.Namespace) -> list[Counts]:
    """Every partition as a task of a Ray cluster that is running; files are shared by its machines."""
    try:
        import ray
    except ImportError as error:
        raise RuntimeError("--ray-address needs the package ray: pip install ray") from error
    is_new = not ray.is_initialized()
    if is_new:
        ray.init(address=args.ray_address, log_to_driver=False)
    try:
        processes = args.workers // args.partitions
        task = ray.remote(encode_partition).options(num_cpus=processes)
        one = argparse.Namespace(**(vars(args) | {"workers": processes}))
        return ray.get([task.remote(one, i) for i in range(args.partitions)])
    finally:
        if is_new:
            ray.shutdown()
