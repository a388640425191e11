"""From JSON lines to token files: documents are tokenized by several processes and written in input order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.datasets.json_lines import InputFiles, LineBlock, texts_of

_BLOCKS_IN_FLIGHT = 3  # per worker: enough to keep it busy, few enough to bound memory


@dataclass(frozen=True)
class EncodedDocuments:
    """The tokens of one key of some documents."""

    tokens: numpy.ndarray
    sequence_lengths: list[int]
    sequence_counts: list[int]
    """Sequences of each document; a document without tokens has none."""


@dataclass(frozen=True)
class EncodedBlock:
    """What became of one block of lines."""

    documents: dict[str, EncodedDocuments]
    num_documents: int
    num_bytes: int


class DocumentEncoder:
    """Tokenizes the values of some keys of JSON lines.

    Args:
        tokenizer: makes the ids.
        keys: which values.
        append_eod: end every document that has tokens with the end-of-document id.
    """

    def __init__(self, tokenizer: MegatronTokenizer, keys: list[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = keys
        self.eod = tokenizer.eod if append_eod else None
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)

    def encode(self, block: LineBlock) -> EncodedBlock:
        """The tokens of all documents of a block."""
        texts: dict[str, list[list[str]]] = {key: [] for key in self.keys}
        for line, record in block.records(self.keys):
            for key in self.keys:
                texts[key].append(texts_of(block, line, key, record[key]))
        documents = {key: self._encode_documents(texts[key]) for key in self.keys}
        return EncodedBlock(documents, len(texts[self.keys[0]]), len(block.data))

    def _encode_documents(self, documents: list[list[str]]) -> EncodedDocuments:
        encoded = iter(self.tokenizer.tokenize_batch(list(itertools.chain.from_iterable(documents))))
        sequences: list[list[int]] = []
        counts = []
        for sentences in documents:
            kept = [ids for ids in itertools.islice(encoded, len(sentences)) if len(ids)]
            if kept and self.eod is not None:
                kept[-1] = [*kept[-1], self.eod]
            sequences += kept
            counts.append(len(kept))
        lengths = [len(ids) for ids in sequences]
        tokens = numpy.fromiter(itertools.chain.from_iterable(sequences), self.dtype, sum(lengths))
        return EncodedDocuments(tokens, lengths, counts)


def encode_in_order(encoder: DocumentEncoder, blocks: Iterator[LineBlock], workers: int) -> Iterator[EncodedBlock]:
    """Encoded blocks in the order of `blocks`, made by `workers` processes (1: by this one)."""
    if workers == 1:
        yield from map(encoder.encode, blocks)
        return
    # fork: a worker starts at once with the tokenizer that is loaded already
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder, os.getpid()))
    try:
        pending = deque(pool.submit(_encode_here, b) for b in itertools.islice(blocks, workers * _BLOCKS_IN_FLIGHT))
        while pending:
            yield pending.popleft().result()
            for block in itertools.islice(blocks, 1):
                pending.append(pool.submit(_encode_here, block))
    except BrokenProcessPool:
        raise RuntimeError("a worker process died, perhaps for want of memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: DocumentEncoder | None = None


def _start_worker(encoder: DocumentEncoder, parent: int) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # a killed parent cannot tell its workers to end


def _encode_here(block: LineBlock) -> EncodedBlock:
    assert _worker_encoder is not None
    return _worker_encoder.encode(block)


class Progress:
    """Says how far the work is: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, num_bytes: int, log_interval: int, stream: TextIO) -> None:
        self.num_bytes = num_bytes
        self.log_interval = log_interval
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.start = time.monotonic()
        self.num_documents = 0
        self.num_bytes_encoded = 0
        self._next_documents = log_interval
        self._next_time = self.start

    def add(self, block: EncodedBlock, num_bytes_read: int) -> None:
        """Count a finished block; `num_bytes_read` of the input files are read by now."""
        self.num_documents += block.num_documents
        self.num_bytes_encoded += block.num_bytes
        now = time.monotonic()
        if self.is_terminal and now >= self._next_time:
            self._next_time = now + 0.2
            share = num_bytes_read / self.num_bytes if self.num_bytes else 0.0  # a pipe has no size
            left = (now - self.start) * (1 - share) / share if share else 0.0
            rest = f" {share:4.0%}, {_minutes(left)} left" if share else ""
            self.stream.write(f"\r{self._state()}{rest} \x1b[K")
            self.stream.flush()
        elif not self.is_terminal and self.num_documents >= self._next_documents:
            self._next_documents = (self.num_documents // self.log_interval + 1) * self.log_interval
            print(self._state(), file=self.stream, flush=True)

    def finish(self) -> None:
        """Say the final numbers."""
        print(f"\r{self._state()}\x1b[K" if self.is_terminal else self._state(), file=self.stream, flush=True)

    def _state(self) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        return (
            f"Processed {self.num_documents} documents ({self.num_documents / elapsed:.1f} docs/s, "
            f"{self.num_bytes_encoded / elapsed / 1e6:.2f} MB/s)."
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def output_prefix_of(output_prefix: str, key: str) -> str:
    """Where the tokens of a key go."""
    return f"{output_prefix}_{key}_document"


def preprocess(
    files: InputFiles,
    output_prefix: str,
    encoder: DocumentEncoder,
    workers: int,
    log_interval: int = 1000,
    stream: TextIO = sys.stderr,
) -> int:
    """Tokenize the files to `<output_prefix>_<key>_document.bin/.idx`, one pair for each key.

    All pairs appear together at the end; after an error, nothing has changed.

    Returns the number of documents.
    """
    with ExitStack() as stack:
        builders = _open_builders(stack, output_prefix, encoder)
        progress = Progress(files.num_bytes, log_interval, stream)
        for block in encode_in_order(encoder, files.blocks(), workers):
            for key, encoded in block.documents.items():
                builders[key].add_documents(encoded.tokens, encoded.sequence_lengths, encoded.sequence_counts)
            progress.add(block, files.num_bytes_read)
        _publish(builders, output_prefix)
        progress.finish()
    return progress.num_documents


def merge(prefixes: list[str], output_prefix: str, encoder: DocumentEncoder) -> None:
    """Join what `preprocess` wrote under several prefixes, in their order."""
    with ExitStack() as stack:
        builders = _open_builders(stack, output_prefix, encoder)
        for key, builder in builders.items():
            for prefix in prefixes:
                builder.add_index(output_prefix_of(prefix, key))
        _publish(builders, output_prefix)


def _open_builders(stack: ExitStack, output_prefix: str, encoder: DocumentEncoder) -> dict[str, IndexedDatasetBuilder]:
    """A builder for each key, removed again if the block of `stack` fails."""
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    builders = {}
    for key in encoder.keys:
        path = get_bin_path(output_prefix_of(output_prefix, key))
        builders[key] = stack.enter_context(IndexedDatasetBuilder(path, encoder.dtype))
    return builders


def _publish(builders: dict[str, IndexedDatasetBuilder], output_prefix: str) -> None:
    for key, builder in builders.items():
        builder.complete(get_idx_path(output_prefix_of(output_prefix, key)))
    for builder in builders.values():
        builder.publish()
