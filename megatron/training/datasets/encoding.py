"""From blocks of JSON lines to token ids: what each worker process does."""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from megatron.core.datasets.index_file import DType
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.datasets.input_files import Block
from megatron.training.datasets.json_lines import InputError
from megatron.training.datasets.long_lines import LongLine, Span

SplitSentences = Callable[[str], list[str]]
_numbers = itertools.count()
_SPLIT_CHARACTERS = 1_000_000  # sentences are looked for in that much text at a time


@dataclass(frozen=True)
class EncodedDocuments:
    """The tokens of one key of some documents."""

    tokens: numpy.ndarray | Path
    """In the type of the data set; those of a very long document lie in a file, which the reader removes."""
    sequence_lengths: numpy.ndarray
    sequence_counts: numpy.ndarray
    """Sequences of each document; a document without tokens has none."""


@dataclass
class EncodedBlock:
    """What became of one block of lines."""

    documents: dict[str, EncodedDocuments] = field(default_factory=dict)
    num_documents: int = 0
    num_bytes: int = 0
    bad_lines: list[str] = field(default_factory=list)
    """What is wrong with the lines that were left out."""
    split_lines: bytes | Path = b""
    """The lines again, with a list of sentences under each key; empty unless asked for."""


class DocumentEncoder:
    """Tokenizes the values of some keys of JSON lines.

    Args:
        tokenizer: makes the ids.
        keys: which values.
        append_eod: end every document that has tokens with the end-of-document id.
        split: cuts text into sentences, each a sequence of its own. None: a text is one sequence.
        keep_split_lines: also give the lines back with their sentences.
        skip_bad_lines: leave out lines that cannot be used; otherwise the first one raises InputError.
        scratch: start of the names of files with the tokens of very long lines.
    """

    def __init__(
        self,
        tokenizer: MegatronTokenizer,
        keys: list[str],
        append_eod: bool,
        split: SplitSentences | None = None,
        keep_split_lines: bool = False,
        skip_bad_lines: bool = False,
        scratch: str = "preprocess",
    ) -> None:
        self.tokenizer = tokenizer
        self.keys = keys
        self.eod = tokenizer.eod if append_eod else None
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.split = split
        self.keep_split_lines = keep_split_lines
        self.skip_bad_lines = skip_bad_lines
        self.scratch = scratch

    def load(self) -> None:
        """Load all that tokenizing needs, which else happens at the first block."""
        self.tokenizer.tokenize_flat([])

    def encode(self, block: Block) -> EncodedBlock:
        """The tokens of all documents of a block."""
        if isinstance(block, LongLine):
            return self._encode_long_line(block)
        result = EncodedBlock(num_bytes=block.num_bytes)
        documents: dict[str, list[list[str]]] = {key: [] for key in self.keys}
        for _, texts in block.records(self.keys, result.bad_lines if self.skip_bad_lines else None):
            for key in self.keys:
                documents[key].append(self._sentences(texts[key]))
        result.num_documents = len(documents[self.keys[0]])
        result.documents = {key: self._encode_documents(documents[key]) for key in self.keys}
        if self.keep_split_lines:
            rows = zip(*documents.values())
            lines = (json.dumps(dict(zip(self.keys, row)), ensure_ascii=False) + "\n" for row in rows)
            result.split_lines = "".join(lines).encode("utf-8")
        return result

    def _sentences(self, texts: list[str]) -> list[str]:
        if self.split is None:
            return texts
        return [sentence for text in texts for part in _parts_of(text) for sentence in self.split(part)]

    def _encode_documents(self, documents: list[list[str]]) -> EncodedDocuments:
        tokens, lengths = self._tokens_of(list(itertools.chain.from_iterable(documents)))
        num_sentences = numpy.fromiter(map(len, documents), numpy.int64, len(documents))
        document_of = numpy.repeat(numpy.arange(len(documents)), num_sentences)[lengths > 0]
        lengths = lengths[lengths > 0]
        counts = numpy.bincount(document_of, minlength=len(documents))
        if self.eod is not None:
            last = (numpy.cumsum(counts) - 1)[counts > 0]  # the last sequence of each document that has one
            tokens = numpy.insert(tokens, numpy.cumsum(lengths)[last], self.eod)
            lengths[last] += 1
        return EncodedDocuments(tokens, lengths, counts)

    def _tokens_of(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        tokens, lengths = self.tokenizer.tokenize_flat(texts)
        return self._stored(tokens), lengths

    def _stored(self, tokens: numpy.ndarray) -> numpy.ndarray:
        limits = numpy.iinfo(self.dtype)
        if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise ValueError(
                f"token ids {tokens.min()} to {tokens.max()} do not fit into {limits.dtype}: the tokenizer says "
                f"that it has {self.tokenizer.vocab_size}"
            )
        return tokens.astype(self.dtype)

    # -- lines that are read in pieces -----------------------------------------------------------------

    def _encode_long_line(self, line: LongLine) -> EncodedBlock:
        result = EncodedBlock(num_bytes=line.num_bytes)
        try:
            values = line.values(self.keys)
        except InputError as error:
            if not self.skip_bad_lines:
                raise
            result.bad_lines.append(str(error))
            return result
        result.num_documents = 1
        for key, texts in values.items():
            result.documents[key] = self._encode_long_document(line, key, texts, self._scratch_file())
        if self.keep_split_lines:
            result.split_lines = self._scratch_file()
            self._write_split_line(line, values, result.split_lines)
        return result

    def _scratch_file(self) -> Path:
        return Path(f"{self.scratch}_{os.getpid()}_{next(_numbers)}.partial")

    def _encode_long_document(self, line: LongLine, key: str, texts: list[str | Span], path: Path) -> EncodedDocuments:
        lengths = array("q")
        with open(path, "wb") as file:
            for tokens, more in self._tokens_in_pieces(line, key, texts):
                file.write(self._stored(tokens).data)
                lengths.frombytes(numpy.asarray(more, numpy.int64).tobytes())
            if lengths and self.eod is not None:
                file.write(numpy.array([self.eod], self.dtype).data)
                lengths[-1] += 1
        return EncodedDocuments(path, numpy.array(lengths), numpy.array([len(lengths)]))

    def _tokens_in_pieces(
        self, line: LongLine, key: str, texts: list[str | Span]
    ) -> Iterator[tuple[numpy.ndarray, list[int] | numpy.ndarray]]:
        """Tokens, and the lengths of the sequences that end with them."""
        if self.split is not None:
            for sentences in self._long_sentences(line, key, texts):
                tokens, lengths = self.tokenizer.tokenize_flat(sentences)
                yield tokens, lengths[lengths > 0]
            return
        for text in texts:
            num_tokens = 0
            parts = [text] if isinstance(text, str) else line.decode(text, key)
            for tokens in self.tokenizer.tokenize_parts(parts):
                num_tokens += len(tokens)
                yield tokens, []
            yield numpy.empty(0, self.dtype), [num_tokens] if num_tokens else []

    def _long_sentences(self, line: LongLine, key: str, texts: list[str | Span]) -> Iterator[list[str]]:
        assert self.split is not None
        for text in texts:
            rest = ""
            for piece in [text] if isinstance(text, str) else line.decode(text, key):
                rest += piece
                while len(rest) > _SPLIT_CHARACTERS:
                    yield self.split(rest[:_SPLIT_CHARACTERS])
                    rest = rest[_SPLIT_CHARACTERS:]
            yield self.split(rest)

    def _write_split_line(self, line: LongLine, values: dict[str, list[str | Span]], path: Path) -> None:
        with open(path, "w", encoding="utf-8") as file:
            for i, (key, texts) in enumerate(values.items()):
                file.write(("{" if i == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": [")
                separator = ""
                for sentence in itertools.chain.from_iterable(self._long_sentences(line, key, texts)):
                    file.write(separator + json.dumps(sentence, ensure_ascii=False))
                    separator = ", "
                file.write("]")
            file.write("}\n")


def _parts_of(text: str) -> Iterator[str]:
    for begin in range(0, len(text), _SPLIT_CHARACTERS):
        yield text[begin : begin + _SPLIT_CHARACTERS]
