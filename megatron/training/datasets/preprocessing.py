"""From JSON lines to token files: documents are tokenized by several processes and written in input order."""

from __future__ import annotations

import glob
import os
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from megatron.core.datasets.index_file import get_bin_path, get_idx_path
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.training.datasets.encoding import DocumentEncoder, EncodedBlock
from megatron.training.datasets.input_files import InputFiles
from megatron.training.datasets.progress import Progress
from megatron.training.datasets.workers import encode_in_order

PARTIAL = ".partial"


@dataclass(frozen=True)
class Output:
    """Names of what a run, or one partition of it, writes."""

    prefix: str
    keys: tuple[str, ...]
    level: str = "document"
    """"document" or "sentence": what a sequence is."""
    split_copy: Path | None = None
    """Where the lines go again, cut into sentences."""

    def dataset_of(self, key: str) -> str:
        """Prefix of the token files of a key."""
        return f"{self.prefix}_{key}_{self.level}"

    def datasets(self) -> list[str]:
        """Prefixes of all token files."""
        return [self.dataset_of(key) for key in self.keys]

    @property
    def scratch(self) -> str:
        """Start of the names of files that are gone at the end."""
        return f"{self.prefix}_scratch"

    @property
    def bad_lines(self) -> Path:
        """The list of lines that were left out."""
        return Path(f"{self.prefix}_bad_lines.txt")


@dataclass(frozen=True)
class Counts:
    """What a run did."""

    documents: int
    bad_lines: int


def preprocess(
    files: InputFiles,
    output: Output,
    encoder: DocumentEncoder,
    workers: int,
    log_interval: int = 1000,
    stream: TextIO = sys.stderr,
) -> Counts:
    """Tokenize the files to one pair of token files for each key.

    All pairs appear together at the end; after an error, nothing has changed.
    """
    with ExitStack() as stack:
        writer = _Writer(stack, output, encoder)
        progress = Progress(files.num_bytes, log_interval, stream)
        for block, encoded in encode_in_order(encoder, files.blocks(), workers):
            writer.add(encoded)
            files.forget(block)
            progress.add(encoded, files.num_bytes_read)
        writer.publish()
        progress.finish()
    return Counts(progress.num_documents, writer.num_bad_lines)


def merge(parts: list[Output], output: Output, encoder: DocumentEncoder) -> None:
    """Join what `preprocess` wrote for several partitions, in their order."""
    with ExitStack() as stack:
        writer = _Writer(stack, output, encoder)
        for key, builder in writer.builders.items():
            for part in parts:
                builder.add_index(part.dataset_of(key))
        writer.publish()


class _Writer:
    """The files of an output while they are written; `stack` removes them again if its block fails."""

    def __init__(self, stack: ExitStack, output: Output, encoder: DocumentEncoder) -> None:
        Path(output.prefix).parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.num_bad_lines = 0
        self.builders = {
            key: stack.enter_context(IndexedDatasetBuilder(get_bin_path(output.dataset_of(key)), encoder.dtype))
            for key in output.keys
        }
        remove_scratch(output)  # of a run that was killed; no other one can hold the builders' locks
        stack.callback(remove_scratch, output)
        self._bad_lines = _open_partial(stack, output.bad_lines) if encoder.skip_bad_lines else None
        self._split_copy = _open_partial(stack, output.split_copy) if output.split_copy else None

    def add(self, block: EncodedBlock) -> None:
        """Append a block to all files."""
        for key, found in block.documents.items():
            if isinstance(found.tokens, Path):
                self.builders[key].add_documents_of_file(
                    str(found.tokens), found.sequence_lengths, found.sequence_counts
                )
                found.tokens.unlink()
            else:
                self.builders[key].add_documents(found.tokens, found.sequence_lengths, found.sequence_counts)
        self.num_bad_lines += len(block.bad_lines)
        if self._bad_lines is not None:
            self._bad_lines.writelines(line.encode("utf-8", "backslashreplace") + b"\n" for line in block.bad_lines)
        if self._split_copy is not None and isinstance(block.split_lines, bytes):
            self._split_copy.write(block.split_lines)
        elif self._split_copy is not None and isinstance(block.split_lines, Path):
            _move_content(block.split_lines, self._split_copy)

    def publish(self) -> None:
        """Give all files their names."""
        for key, builder in self.builders.items():
            builder.complete(get_idx_path(self.output.dataset_of(key)))
        for file, path in ((self._split_copy, self.output.split_copy), (self._bad_lines, self.output.bad_lines)):
            if file is not None and path is not None:
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
        for builder in self.builders.values():
            builder.publish()


def remove_partial(output: Output) -> None:
    """Remove what a run left behind that was killed while it wrote an output anew."""
    for dataset in output.datasets():
        for path in (get_bin_path(dataset), get_idx_path(dataset)):
            Path(path + PARTIAL).unlink(missing_ok=True)
    remove_scratch(output)


def remove_scratch(output: Output) -> None:
    """Remove what a run may leave behind that was killed while it read a very long line."""
    for path in glob.glob(glob.escape(output.scratch) + "_*" + PARTIAL):
        with suppress(OSError):
            os.unlink(path)


def _open_partial(stack: ExitStack, path: Path) -> BinaryIO:
    partial = path.with_name(path.name + PARTIAL)
    stack.callback(partial.unlink, missing_ok=True)
    return stack.enter_context(open(partial, "wb"))


def _move_content(source: Path, target: BinaryIO) -> None:
    with open(source, "rb") as file:
        while piece := file.read(1 << 20):
            target.write(piece)
    source.unlink()
