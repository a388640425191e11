"""Token files of other inputs than documents in JSON: merged data sets, lines of plain text, texts with pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron.core.datasets.index_file import Index, get_bin_path, get_idx_path
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.datasets.encoding import DocumentEncoder, EncodedBlock, EncodedDocuments
from megatron.training.datasets.input_files import Block, InputFiles
from megatron.training.datasets.json_lines import InputError, LineBlock
from megatron.training.datasets.preprocessing import Output
from megatron.training.datasets.workers import encode_in_order


def datasets_in(folder: str) -> list[str]:
    """Prefixes of all token files in a folder, sorted.

    Raises:
        FileNotFoundError: there are none, or one lacks its partner.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}")
    names = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".idx")))
    alone = [name for name in names if f"{name[:-4]}{'.idx' if name.endswith('.bin') else '.bin'}" not in names]
    if alone:
        raise FileNotFoundError(f"{folder} has {', '.join(alone)} without the other file of the pair")
    return [os.path.join(folder, name[:-4]) for name in names if name.endswith(".bin")]


def merge_datasets(prefixes: list[str], output_prefix: str, multimodal: bool) -> None:
    """Join data sets of one number type, in bounded memory."""
    if not prefixes:
        raise FileNotFoundError("there are no data sets to merge")
    dtype = Index(get_idx_path(prefixes[0]), multimodal).dtype
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetBuilder(get_bin_path(output_prefix), dtype, multimodal) as builder:
        for prefix in prefixes:
            builder.add_index(prefix)
        builder.finalize(get_idx_path(output_prefix))


@dataclass(frozen=True)
class PlainOutput(Output):
    """An output with one pair of files, named by the prefix alone."""

    def dataset_of(self, key: str) -> str:
        return self.prefix


class TextLineEncoder(DocumentEncoder):
    """Tokenizes plain text: a line is a document of one sequence; an empty one keeps its place."""

    def __init__(self, tokenizer: MegatronTokenizer, scratch: str) -> None:
        super().__init__(tokenizer, ["text"], append_eod=False, scratch=scratch)

    def encode(self, block: Block) -> EncodedBlock:
        if not isinstance(block, LineBlock):
            raise InputError(f"{block.path}:{block.first_line}: the line is too long, or the file is no plain text")
        lines = []
        for number, line in enumerate(block.lines(), block.first_line):
            try:
                lines.append(line.decode("utf-8").strip())
            except UnicodeDecodeError as error:
                raise block.error(number, f"invalid UTF-8: byte 0x{line[error.start]:02x}", error.start + 1) from None
        tokens, lengths = self._tokens_of(lines)
        documents = EncodedDocuments(tokens, lengths, numpy.ones(len(lines), numpy.int64))
        return EncodedBlock({"text": documents}, len(lines), block.num_bytes)


def write_pictures_with_text(
    files: InputFiles,
    pictures: list[str],
    output_prefix: str,
    encoder: DocumentEncoder,
    pad_length: int | None,
    workers: int,
) -> int:
    """Pairs of a text and a picture: documents of two sequences, int32, with mode 0 and 1.

    Args:
        pad_length: cut texts, or fill them up with the eod token, to this many tokens. None: leave them as they are.

    Returns:
        The number of documents.
    """
    count = 0
    with ExitStack() as stack:
        builder = stack.enter_context(IndexedDatasetBuilder(get_bin_path(output_prefix), numpy.int32, multimodal=True))
        for block, encoded in encode_in_order(encoder, files.blocks(), workers):
            for tokens in _texts_of(encoded):
                if count == len(pictures):
                    raise InputError(f"{block.path} has more texts than the {len(pictures)} pictures")
                if pad_length is not None:
                    tokens = _padded(tokens, pad_length, encoder.tokenizer.eod)
                builder.add_item(tokens.astype(numpy.int32))
                builder.add_item(picture_as_numbers(Path(pictures[count])), mode=1)
                builder.end_document()
                count += 1
            files.forget(block)
        if count < len(pictures):
            raise InputError(f"there are {count} texts for {len(pictures)} pictures")
        builder.finalize(get_idx_path(output_prefix))
    return count


def _texts_of(block: EncodedBlock) -> Iterator[numpy.ndarray]:
    """The tokens of each document."""
    (found,) = block.documents.values()
    if isinstance(found.tokens, Path):
        raise InputError("a text of a picture is longer than any can be")
    sequence_ends = numpy.concatenate([[0], numpy.cumsum(found.sequence_lengths)])
    ends = sequence_ends[numpy.cumsum(found.sequence_counts)]
    yield from numpy.split(found.tokens, ends[:-1]) if len(ends) else ()


def _padded(tokens: numpy.ndarray, length: int, eod: int) -> numpy.ndarray:
    return numpy.pad(tokens.astype(numpy.int64)[:length], (0, max(length - len(tokens), 0)), constant_values=eod)


def picture_as_numbers(path: Path) -> numpy.ndarray:
    """A file's bytes as int32, filled up with zeros; the first number says with how many."""
    data = path.read_bytes()
    fill = -len(data) % 4
    return numpy.concatenate([[fill], numpy.frombuffer(data + bytes(fill), "<i4")]).astype(numpy.int32)
