"""A small corpus split into sentences, with a WordPiece vocabulary of its words."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path

import numpy

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.training.tokenizer.bert_tokenizer import BertWordPieceTokenizer
from tests.functional_tests.program import ROOT

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BOOK = ROOT / "examples" / "data" / "moby_dick.txt.gz"


def write_sentences(directory: Path, num_documents: int = 300, num_words: int = 400) -> dict[str, str]:
    """Paragraphs of a real book as documents of sentences, and their first words as titles; where data and vocabulary
    are."""
    with gzip.open(BOOK, "rt", encoding="utf-8") as book:
        paragraphs = re.split(r"\n\s*\n", book.read())
    texts = [" ".join(paragraph.split()) for paragraph in paragraphs if len(paragraph) > 300][:num_documents]
    words = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *("##" + letter for letter in letters), *(word for word, _ in words.most_common(num_words))]
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(dict.fromkeys([*SPECIAL, ".", ",", *pieces])) + "\n")
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lower_case=True)
    prefix = str(directory / "book_sentence")
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=numpy.uint16)
    for text in texts:
        sentences = [list(tokenizer.tokenize(sentence)) for sentence in re.split(r"(?<=[.!?;])\s+", text)]
        sentences = [sentence for sentence in sentences if sentence]
        builder.add_document(
            numpy.array([token for sentence in sentences for token in sentence]), [len(s) for s in sentences]
        )
    builder.finalize(get_idx_path(prefix))
    titles = str(directory / "book_title")
    builder = IndexedDatasetBuilder(get_bin_path(titles), dtype=numpy.uint16)
    for text in texts:
        title = list(tokenizer.tokenize(" ".join(text.split()[:3])))
        builder.add_document(numpy.array(title), [len(title)])
    builder.finalize(get_idx_path(titles))
    return {"data": prefix, "vocab": str(vocabulary), "titles": titles}
