"""Which sentences make up each block of a retrieval dataset: a pure function of sentence lengths and sizes.

A block is a run of sentences of one document that, with the document's title, about fills a sequence (Lee et al.,
arXiv:1906.00300, section 9.1; Guu et al., arXiv:2002.08909, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from megatron.core.datasets.masked_sample_index import LONG_SENTENCE, shuffled_order

START, END, DOCUMENT, BLOCK = range(4)
"""Columns of a block's row: first sentence, sentence after the last, document, number of the block in its pass."""


@dataclass(frozen=True)
class BlockCutting:
    """How documents are cut into blocks."""

    target_length: int
    """Tokens that a block and its title should reach."""

    min_num_sentences: int
    """Sentences that a block must have; documents with fewer give none."""


def cut_blocks(
    document_starts: numpy.ndarray, sentence_lengths: numpy.ndarray, title_lengths: numpy.ndarray, cutting: BlockCutting
) -> numpy.ndarray:
    """The blocks of one pass over the documents, in order: [blocks, 4] int64, see `BLOCK`.

    A block ends with the sentence that fills it, unless fewer than `min_num_sentences` would be left of the document:
    then it takes them too. Documents with a sentence of more than 512 tokens give no blocks.

    Args:
        document_starts: [documents + 1], the sentence each document starts with, then the one after all.
        sentence_lengths: [sentences], tokens of each.
        title_lengths: [documents], tokens of each title.
    """
    starts = document_starts.astype(numpy.int64)
    begun = numpy.concatenate([[0], numpy.cumsum(sentence_lengths, dtype=numpy.int64)])  # tokens before each sentence
    too_long = numpy.concatenate([[0], numpy.cumsum(sentence_lengths > LONG_SENTENCE)])
    usable = (numpy.diff(starts) >= cutting.min_num_sentences) & (numpy.diff(too_long[starts]) == 0)
    documents = numpy.flatnonzero(usable)
    first = starts[documents]
    rows = []
    while len(documents):  # the next block of all documents at once
        last_of_document = starts[documents + 1]
        full = begun[first] + cutting.target_length - title_lengths[documents]
        end = numpy.maximum(numpy.searchsorted(begun, full), first + cutting.min_num_sentences)
        end = numpy.where(last_of_document - end < cutting.min_num_sentences, last_of_document, end)
        rows.append(numpy.stack([first, end, documents], axis=1))
        documents, first = documents[end < last_of_document], end[end < last_of_document]
    blocks = numpy.concatenate(rows) if rows else numpy.empty((0, 3), numpy.int64)
    blocks = blocks[numpy.argsort(blocks[:, START], kind="stable")]
    return numpy.column_stack([blocks, numpy.arange(len(blocks))])


def build_block_index(one_pass: numpy.ndarray, num_samples: int, seed: int) -> numpy.ndarray:
    """Whole passes over the blocks until there are `num_samples`, shuffled as one: [at least num_samples, 4].

    Returns uint32, or uint64 where sentences are too many for it.

    Raises:
        ValueError: there is no block.
    """
    if not len(one_pass):
        raise ValueError(
            "no document has enough sentences for a block, none longer than 512 tokens: was the text split into "
            "sentences (--split-sentences)? --use-one-sent-docs takes documents of one sentence"
        )
    dtype = numpy.uint32 if one_pass[:, END].max() <= numpy.iinfo(numpy.uint32).max else numpy.uint64
    rows = numpy.tile(one_pass, (max(1, -(-num_samples // len(one_pass))), 1)).astype(dtype)
    return rows[shuffled_order(len(rows), seed + 1)]
