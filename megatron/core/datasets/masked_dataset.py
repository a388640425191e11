"""Base of the datasets for masked language models: samples made of whole sentences, some tokens hidden."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.masked_sample_index import SentenceGrouping, build_masked_sample_index
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.sample_origin import DocumentPart, SampleOrigin
from megatron.core.datasets.token_masking import Masked, NgramMasking, mask_tokens, word_groups
from megatron.core.datasets.utils import Split

_CONTINUATION = "##"  # how a WordPiece token inside a word begins


@dataclass
class MaskedWordPieceDatasetConfig(BlendedMegatronDatasetConfig):
    """Settings of masked datasets; all of these must be given."""

    masking_probability: float | None = None
    """Share of the tokens that is hidden."""

    short_sequence_probability: float | None = None
    """Share of samples that are made shorter than `sequence_length` on purpose."""

    masking_max_ngram: int | None = None
    """Most words that are hidden in one run."""

    masking_do_full_word: bool | None = None
    """Hide whole words only."""

    masking_do_permutation: bool | None = None
    """Also permute some tokens among themselves."""

    masking_use_longer_ngrams: bool | None = None
    """Favour long runs."""

    masking_use_geometric_distribution: bool | None = None
    """Draw the length of runs from a geometric distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("tokenizer", *_SETTINGS) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}")
        for name in ("masking_probability", "short_sequence_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.masking_max_ngram or self.masking_max_ngram < 1:
            raise ValueError(f"masking_max_ngram must be at least 1, got {self.masking_max_ngram}")
        if self.masking_use_longer_ngrams and self.masking_use_geometric_distribution:
            raise ValueError("masking_use_longer_ngrams has no effect on masking_use_geometric_distribution: unset one")


_SETTINGS = (
    "masking_probability",
    "short_sequence_probability",
    "masking_max_ngram",
    "masking_do_full_word",
    "masking_do_permutation",
    "masking_use_longer_ngrams",
    "masking_use_geometric_distribution",
)


class MaskedWordPieceDataset(MegatronDataset):
    """Samples of sentences of one document, for subclasses that turn them into items.

    The data must be split into sentences: one sequence each, documents marked by the document indices.
    """

    config: MaskedWordPieceDatasetConfig

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: MaskedWordPieceDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        if num_samples is None:
            raise ValueError(
                f"{dataset_path}: a masked dataset must be told how many samples to make; a blend of them needs weights"
            )
        tokenizer = config.tokenizer
        assert tokenizer is not None
        self._special = {tokenizer.cls, tokenizer.sep}
        words = tokenizer.inv_vocab
        self._vocab_ids = numpy.array(list(words), dtype=numpy.int64)
        joins = {token for token, text in words.items() if str(text).startswith(_CONTINUATION)}
        self._continues = [token in joins for token in range(tokenizer.vocab_size)]
        if not config.masking_do_full_word:
            self._continues = [False] * len(self._continues)
        assert config.masking_probability is not None and config.masking_max_ngram is not None
        self._masking = NgramMasking(
            probability=config.masking_probability,
            max_ngram=config.masking_max_ngram,
            geometric=bool(config.masking_use_geometric_distribution),
            longer_ngrams=bool(config.masking_use_longer_ngrams),
            permutation=bool(config.masking_do_permutation),
        )
        self.sample_index = self._load_or_build_sample_index()

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), *_SETTINGS]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Number of documents; a split is a range of them."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: Any) -> IndexedDataset:
        """Open `<dataset_path>.bin` and `.idx`."""
        if dataset_path is None:
            raise ValueError("no data is given: name a dataset of sentences with --data-path")
        return IndexedDataset(dataset_path, mmap=config.mmap_bin_files, object_storage_config=config.object_storage)

    def __len__(self) -> int:
        return len(self.sample_index)

    @abstractmethod
    def __getitem__(self, idx: int) -> Mapping[str, Any]:
        """One item, arrays by name."""

    def samples_per_epoch(self) -> float | None:
        if not len(self.sample_index):
            return None
        firsts = self.sample_index[:, 0]  # each pass cuts exactly one sample that begins where a document begins
        return len(firsts) / numpy.count_nonzero(firsts == firsts.min())

    def origin(self, idx: int) -> SampleOrigin:
        first, end, _ = self.sample_index[idx].tolist()
        starts = self.dataset.document_indices
        document = int(numpy.searchsorted(starts, first, side="right")) - 1
        part = DocumentPart(document, first - int(starts[document]), end - int(starts[document]), None)
        tokens = numpy.concatenate([self.dataset[i] for i in range(first, end)])
        return SampleOrigin(self.dataset_path, idx, (part,), "sentences", tokens)

    # -- for subclasses --------------------------------------------------------------------------------

    @abstractmethod
    def _grouping(self) -> SentenceGrouping:
        """How sentences are put together."""

    @abstractmethod
    def _replacement(self, token: int, rng: numpy.random.RandomState) -> int:
        """What stands in the place of a hidden token."""

    def _sentences(self, idx: int) -> tuple[list[numpy.ndarray], int, numpy.random.RandomState]:
        """The sentences of a sample, its target length, and its own random generator."""
        first, end, target_length = self.sample_index[idx].tolist()
        rng = numpy.random.RandomState((self.config.random_seed + idx) % 2**32)
        return [self.dataset[i] for i in range(first, end)], target_length, rng

    def _mask(self, tokens: list[int], target_length: int, rng: numpy.random.RandomState) -> Masked:
        words = word_groups(tokens, self._special.__contains__, self._continues)
        return mask_tokens(tokens, words, target_length, self._masking, self._replacement, rng)

    # -- the index -------------------------------------------------------------------------------------

    def _index_name(self) -> str:
        return f"{self.unique_description_hash}-{type(self).__name__}"

    def _load_or_build_sample_index(self) -> numpy.ndarray:
        arrays, self.built_anew_on_cache_miss = self._index_cache().load_or_build(
            ("sample_index",), self._check_index, self._build_index
        )
        return arrays["sample_index"]

    def _build_index(self) -> dict[str, numpy.ndarray]:
        starts, num_samples = self.dataset.document_indices, self.num_samples
        assert num_samples is not None
        where = f"the {self.index_split.name} split of {self.dataset_path}"
        if num_samples and not len(self.indices):
            raise ValueError(
                f"{where} has none of its {len(starts) - 1} documents, {num_samples} samples are to be made of it: "
                f"use more documents, or another split ({self.config.split})"
            )
        begin, end = (int(self.indices[0]), int(self.indices[-1]) + 1) if len(self.indices) else (0, 0)
        sentence_lengths = self.dataset.sequence_lengths
        try:
            index = build_masked_sample_index(starts[begin : end + 1], sentence_lengths, num_samples, self._grouping())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return {"sample_index": index}

    def _check_index(self, arrays: dict[str, numpy.ndarray]) -> str | None:
        index = arrays["sample_index"]
        assert self.num_samples is not None
        if index.ndim != 2 or index.shape[1] != 3 or index.dtype.kind != "u":
            return f"sample_index is {index.dtype}{list(index.shape)}, expected unsigned rows of 3"
        if len(index) < self.num_samples:
            return f"sample_index has {len(index)} samples, {self.num_samples} are needed"
        if len(index) and int(index[:, 1].max()) > len(self.dataset):
            return f"sample_index names sentences beyond the {len(self.dataset)} of the data"
        return None


def padded(values: list[int] | numpy.ndarray, length: int, pad: int) -> numpy.ndarray:
    """[length] int64: the values, then `pad`."""
    array = numpy.full(length, pad, dtype=numpy.int64)
    array[: len(values)] = values
    return array
