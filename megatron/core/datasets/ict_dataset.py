"""Samples of the inverse cloze task: a sentence as a query, and the block of text that it was taken from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.block_index import DOCUMENT, END, START, BlockCutting, build_block_index, cut_blocks
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.masked_dataset import MaskedWordPieceDataset, padded
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split


@dataclass
class ICTDatasetConfig(BlendedMegatronDatasetConfig):
    """Settings of `ICTDataset`."""

    titles_path: str | None = None
    """Prefix of a dataset with the title of each document, in the order of the documents; None: there are no titles."""

    query_in_block_probability: float = 0.1
    """Share of samples whose query also stays in its block."""

    use_one_sentence_documents: bool = False
    """Make blocks of one sentence, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            raise ValueError("ICTDatasetConfig needs tokenizer")
        if not 0 <= self.query_in_block_probability <= 1:
            raise ValueError(
                f"query_in_block_probability must be between 0 and 1, got {self.query_in_block_probability}"
            )


class ICTDataset(MegatronDataset):
    """Queries `[CLS] sentence [SEP]` and their blocks `[CLS] title [SEP] other sentences [SEP]` (Lee et al.,
    arXiv:1906.00300, section 4); without titles `[CLS] other sentences [SEP]`.

    The data must be split into sentences. An item is a dictionary of int64 arrays: `query_tokens`, `query_pad_mask`
    (1 on real tokens), `context_tokens` and `context_pad_mask` [s], and `block_data` [4], see `block_index`.
    """

    config: ICTDatasetConfig

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: ICTDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        self.titles = _open_titles(config, indexed_dataset, dataset_path)
        self.first_document = int(indexed_indices[0]) if len(indexed_indices) else 0
        self.block_index = self._load_or_build_block_index()

    @staticmethod
    def _key_config_attributes() -> list[str]:
        own = ["titles_path", "use_one_sentence_documents"]
        return [*MegatronDataset._key_config_attributes(), *own]

    numel_low_level_dataset = staticmethod(MaskedWordPieceDataset.numel_low_level_dataset)
    build_low_level_dataset = staticmethod(MaskedWordPieceDataset.build_low_level_dataset)

    def __len__(self) -> int:
        return len(self.block_index)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return self.sample(self.block_index[idx], seed=(self.config.random_seed + idx) % 2**32)

    def sample(self, row: numpy.ndarray, seed: int) -> dict[str, Any]:
        """The item of a block, whose query is drawn by `seed`."""
        sentences = self._sentences(row)
        rng = numpy.random.RandomState(seed)
        chosen = rng.randint(0, len(sentences))
        query = sentences[chosen]
        if rng.random_sample() >= self.config.query_in_block_probability:
            del sentences[chosen]
        query_tokens, query_mask = self._framed([query])
        context_tokens, context_mask = self._context(sentences, row)
        return {
            "query_tokens": query_tokens,
            "query_pad_mask": query_mask,
            "context_tokens": context_tokens,
            "context_pad_mask": context_mask,
            "block_data": row.astype(numpy.int64),
        }

    # -- for an index of all blocks --------------------------------------------------------------------

    def blocks(self) -> numpy.ndarray:
        """Each block of the split once, in order: [blocks, 4]."""
        lengths = self.dataset.sequence_lengths
        return cut_blocks(self._document_starts(), lengths, self._title_lengths(), self._cutting())

    def whole_block(self, row: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(tokens, mask) of a block with its title, all sentences in it: [s] each."""
        return self._context(self._sentences(row), row)

    def block_tokens(self, row: numpy.ndarray) -> list[int]:
        """The tokens of a block's sentences, nothing added and nothing cut."""
        return numpy.concatenate(self._sentences(row)).tolist()

    def title_tokens(self, document: int) -> numpy.ndarray:
        """The title of a document of this split; empty without titles."""
        if self.titles is None:
            return numpy.empty(0, numpy.int64)
        starts = self.titles.document_indices
        whole = self.first_document + document
        return numpy.concatenate([self.titles[i] for i in range(int(starts[whole]), int(starts[whole + 1]))])

    # -- the parts of a sample -------------------------------------------------------------------------

    def _sentences(self, row: numpy.ndarray) -> list[numpy.ndarray]:
        return [self.dataset[i] for i in range(int(row[START]), int(row[END]))]

    def _context(self, sentences: list[numpy.ndarray], row: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        block = numpy.concatenate(sentences) if sentences else numpy.empty(0, numpy.int64)
        title = self.title_tokens(int(row[DOCUMENT]))
        return self._framed([block] if self.titles is None else [title, block])

    def _framed(self, parts: list[numpy.ndarray]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return framed(self.config.tokenizer, self.config.sequence_length, *(part.tolist() for part in parts))

    # -- the index -------------------------------------------------------------------------------------

    def _cutting(self) -> BlockCutting:
        return BlockCutting(self.config.sequence_length - 3, 1 if self.config.use_one_sentence_documents else 2)

    def _document_starts(self) -> numpy.ndarray:
        return self.dataset.document_indices[self.first_document : self.first_document + len(self.indices) + 1]

    def _title_lengths(self) -> numpy.ndarray:
        """[documents of the split]."""
        if self.titles is None:
            return numpy.zeros(len(self.indices), numpy.int64)
        begun = numpy.concatenate([[0], numpy.cumsum(self.titles.sequence_lengths, dtype=numpy.int64)])
        of_documents = numpy.diff(begun[self.titles.document_indices])
        return of_documents[self.first_document : self.first_document + len(self.indices)]

    def _index_sources(self) -> list[str]:
        titles = [] if self.titles is None else [self.titles.index.path]
        return [*super()._index_sources(), *titles]

    def _load_or_build_block_index(self) -> numpy.ndarray:
        arrays, self.built_anew_on_cache_miss = self._index_cache().load_or_build(
            ("block_index",), self._check_index, self._build_index
        )
        return arrays["block_index"]

    def _build_index(self) -> dict[str, numpy.ndarray]:
        if not len(self.indices):
            return {"block_index": numpy.empty((0, 4), numpy.uint32)}
        return {"block_index": build_block_index(self.blocks(), self.num_samples or 0, self.config.random_seed)}

    def _check_index(self, arrays: dict[str, numpy.ndarray]) -> str | None:
        index = arrays["block_index"]
        if index.ndim != 2 or index.shape[1] != 4 or index.dtype.kind != "u":
            return f"block_index is {index.dtype}{list(index.shape)}, expected unsigned rows of 4"
        if len(self.indices) and len(index) < (self.num_samples or 0):
            return f"block_index has {len(index)} blocks, {self.num_samples} are needed"
        if len(index) and int(index[:, END].max()) > len(self.dataset):
            return f"block_index names sentences beyond the {len(self.dataset)} of the data"
        return None


def framed(tokenizer: Any, length: int, *parts: Sequence[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(tokens, mask) [length] of `[CLS] part [SEP] part [SEP]`; what is too long loses its end, not the last [SEP]."""
    tokens = [tokenizer.cls]
    for part in parts:
        tokens += [*part, tokenizer.sep]
    if len(tokens) > length:
        tokens = [*tokens[: length - 1], tokenizer.sep]
    return padded(tokens, length, tokenizer.pad), padded([1] * len(tokens), length, 0)


def _open_titles(config: ICTDatasetConfig, bodies: IndexedDataset, path: str) -> IndexedDataset | None:
    if config.titles_path is None:
        return None
    titles = IndexedDataset(config.titles_path, mmap=config.mmap_bin_files, object_storage_config=config.object_storage)
    found, wanted = len(titles.document_indices) - 1, len(bodies.document_indices) - 1
    if found != wanted:
        raise ValueError(
            f"{config.titles_path} has {found} titles for the {wanted} documents of {path}: make both from the same "
            "file (--json-keys text title --split-sentences)"
        )
    return titles
