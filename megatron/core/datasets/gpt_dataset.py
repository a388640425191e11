"""Samples for training a language model: fixed numbers of tokens cut out of shuffled documents."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_sample_index import SamplePlan, build_indices, plan_samples, shuffle_dtype
from megatron.core.datasets.index_cache import check_array
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.sample_origin import DocumentPart, SampleOrigin
from megatron.core.datasets.utils import Split

logger = logging.getLogger(__name__)

_NO_PAD_TOKEN = -1
_CHECKED_SEQUENCES = 4  # sequences whose ids are compared with the vocabulary when a dataset is opened
_CHECKED_SAMPLES = 16  # rows of a loaded sample index that are compared with the data


@dataclass
class GPTDatasetConfig(BlendedMegatronDatasetConfig):
    """Settings of `GPTDataset`; the first three and the tokenizer must be given."""

    reset_position_ids: bool | None = None
    """Count positions from 0 again after each end-of-document token."""

    reset_attention_mask: bool | None = None
    """Attention does not reach across end-of-document tokens."""

    eod_mask_loss: bool | None = None
    """No loss where the input is an end-of-document token."""

    create_attention_mask: bool = True
    """Give each sample an attention mask, [1, s, s]."""

    drop_last_partial_validation_sequence: bool = True
    """Leave out the last validation sample if tokens run out in it; otherwise pad it."""

    add_extra_token_to_sequence: bool = True
    """Read one token beyond the sample, so that its last position has a label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokenizer", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
            if getattr(self, name) is None:
                raise ValueError(f"GPTDatasetConfig needs {name}")


class GPTDataset(MegatronDataset):
    """Samples of `sequence_length` tokens with labels, loss mask, positions and, if configured, attention
    mask.

    The order of samples depends on the data, the sizes and the seed alone. Item k is a dictionary:

    - tokens, labels: [s] int64; padding is 0.
    - loss_mask: [s] float32, 0 on padding and where the configuration says so.
    - position_ids: [s] int64.
    - attention_mask: [1, s, s] bool, True where attention is not allowed; only with `create_attention_mask`.

    Item None is item 0 with a loss mask of zeros, which fills up a batch.

    Raises:
        ValueError: the data has fewer tokens than a sample, or ids beyond the tokenizer's vocabulary.
    """

    config: GPTDatasetConfig

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        assert config.tokenizer is not None
        self._extra = 1 if config.add_extra_token_to_sequence else 0
        self._sample_tokens = config.sequence_length + self._extra
        self._pad = _id_or_none(config.tokenizer, "pad", _NO_PAD_TOKEN)
        self._vocab_size = _id_or_none(config.tokenizer, "vocab_size", None)
        self._needs_eod = bool(config.reset_position_ids or config.reset_attention_mask or config.eod_mask_loss)
        self._eod = config.tokenizer.eod if self._needs_eod else None
        self._positions = _positions(config.sequence_length)
        self._causal_mask: torch.Tensor | None = None

        self._check_some_sequences()
        self._plan = self._plan_samples()
        arrays, self.built_anew_on_cache_miss = self._index_cache().load_or_build(
            ("document_index", "sample_index", "shuffle_index"), self._check_indices, self._build_indices
        )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Number of sequences; a split is a range of them."""
        return len(low_level_dataset.sequence_lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: BlendedMegatronDatasetConfig) -> Any:
        """Open `<dataset_path>.bin` and `.idx`."""
        if dataset_path is None:
            raise ValueError(
                "no data is given: name a dataset with --data-path, or ask for made-up data with --mock-data"
            )
        return IndexedDataset(dataset_path, mmap=config.mmap_bin_files, object_storage_config=config.object_storage)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        text = self._read_sample(int(self.shuffle_index[0 if idx is None else idx]))
        item = self._make_item(text)
        if idx is None:
            item["loss_mask"].zero_()
        return item

    def samples_per_epoch(self) -> float:
        return self._plan.tokens_per_epoch / self.config.sequence_length

    def origin(self, idx: int) -> SampleOrigin:
        row = int(self.shuffle_index[idx])
        (first, begin), (last, end) = self.sample_index[row : row + 2].tolist()
        parts = []
        for position in range(first, last + 1):
            document = int(self.document_index[position])
            stop = end + self._extra if position == last else int(self.dataset.sequence_lengths[document])
            earlier = int(numpy.count_nonzero(self.document_index[:position] == document))
            parts.append(DocumentPart(document, begin if position == first else 0, stop, earlier))
        tokens = [self.dataset.get(part.document, part.begin, part.end - part.begin) for part in parts]
        return SampleOrigin(self.dataset_path, idx, tuple(parts), "tokens", numpy.concatenate(tokens))

    # -- one sample ------------------------------------------------------------------------------------

    def _read_sample(self, row: int) -> numpy.ndarray:
        """The tokens from boundary `row` to `row + 1` and the extra one, padded at the end if too few."""
        (first, begin), (last, end) = self.sample_index[row : row + 2].tolist()
        documents = self.document_index[first : last + 1].tolist()
        end += self._extra
        if first == last:
            pieces = [self.dataset.get(documents[0], begin, max(end - begin, 0))]
        else:
            pieces = [self.dataset.get(documents[0], begin)]
            pieces += [self.dataset.get(document) for document in documents[1:-1]]
            pieces.append(self.dataset.get(documents[-1], 0, end))
        text = pieces[0] if len(pieces) == 1 else numpy.concatenate(pieces)
        if self._vocab_size is not None and text.size and not _ids_within(text, self._vocab_size):
            for document, piece in zip(documents, pieces):
                self._check_ids(document, piece)
        missing = self._sample_tokens - text.size
        if missing:
            text = numpy.concatenate([text.astype(numpy.int64), numpy.full(missing, self._pad, numpy.int64)])
        return text

    def _make_item(self, text: numpy.ndarray) -> dict[str, torch.Tensor]:
        if self._extra:
            tokens, labels = text[:-1].astype(numpy.int64), text[1:].astype(numpy.int64)
        else:
            tokens, labels = text.astype(numpy.int64), numpy.roll(text, -1).astype(numpy.int64)
            labels[-1] = self._pad
        loss_mask = (labels != self._pad).astype(numpy.float32)
        item = {"position_ids": self._positions.clone()}
        documents = None
        if self._needs_eod:
            is_eod = tokens == self._eod
            documents = numpy.cumsum(is_eod) - is_eod  # [s], ends of documents before each position
            if self.config.eod_mask_loss:
                loss_mask[is_eod] = 0.0
            if self.config.reset_position_ids:
                item["position_ids"] = torch.from_numpy(_positions_in_documents(documents))
        if self.config.create_attention_mask:
            item["attention_mask"] = self._make_attention_mask(documents)
        tokens[tokens == self._pad] = 0
        labels[labels == self._pad] = 0
        item["tokens"], item["labels"] = torch.from_numpy(tokens), torch.from_numpy(labels)
        item["loss_mask"] = torch.from_numpy(loss_mask)
        return item

    def _make_attention_mask(self, documents: numpy.ndarray | None) -> torch.Tensor:
        """[1, s, s], True above the diagonal and, if masks are reset, between different documents."""
        if self._causal_mask is None:
            s = self.config.sequence_length
            self._causal_mask = torch.ones(1, s, s, dtype=torch.bool).triu_(diagonal=1)
        if documents is None or not self.config.reset_attention_mask:
            return self._causal_mask.clone()
        document = torch.from_numpy(documents)
        return self._causal_mask | (document[:, None] != document[None, :])

    # -- the index -------------------------------------------------------------------------------------

    def _plan_samples(self) -> SamplePlan:
        lengths = self.dataset.sequence_lengths
        num_tokens = int(lengths[self.indices].sum(dtype=numpy.int64))
        if self.num_samples == 0 and num_tokens < self._sample_tokens:
            return SamplePlan(num_tokens, 1, 0, None)
        drop_last = self.index_split is not Split.valid or self.config.drop_last_partial_validation_sequence
        self._require_tokens(num_tokens, drop_last)
        return plan_samples(
            num_tokens,
            self.config.sequence_length,
            self.num_samples,
            self.config.add_extra_token_to_sequence,
            drop_last,
        )

    def _require_tokens(self, num_tokens: int, drop_last: bool) -> None:
        """Refuse data with less than one sample; only in small validation and test splits it may repeat."""
        if num_tokens >= self._sample_tokens or (num_tokens > self._extra and not drop_last):
            return
        counts = (
            f"the {self.index_split.name} split of {self.dataset_path or 'the mock data'} has "
            f"{len(self.indices)} of {len(self.dataset)} sequences with {num_tokens} tokens in all, a sample "
            f"needs {self._sample_tokens} (sequence_length {self.config.sequence_length} + {self._extra})"
        )
        enough_in_all = int(self.dataset.sequence_lengths.sum(dtype=numpy.int64)) >= self._sample_tokens
        repeats = self.num_samples is not None and num_tokens > 0
        if repeats and enough_in_all and self.index_split is not Split.train:
            logger.warning("%s: its tokens repeat within a sample", counts)
            return
        raise ValueError(f"{counts}: use a shorter sequence_length, more data, or another split ({self.config.split})")

    def _build_indices(self) -> dict[str, numpy.ndarray]:
        if self._plan.num_samples == 0:
            logger.warning("%s: no samples in the %s split", self.dataset_path, self.index_split.name)
        return build_indices(
            self._plan,
            self.dataset.sequence_lengths,
            self.indices,
            self.config.sequence_length,
            self.config.add_extra_token_to_sequence,
            self.config.random_seed,
        )

    def _check_indices(self, arrays: dict[str, numpy.ndarray]) -> str | None:
        """What is wrong with a loaded index, None if nothing: shapes, and some samples against the data."""
        documents, samples, shuffle = (arrays[f"{name}_index"] for name in ("document", "sample", "shuffle"))
        plan = self._plan
        sample_dtype = numpy.int64 if samples.dtype == numpy.int64 else numpy.int32
        problems = [
            check_array("document_index", documents, numpy.int32, (plan.num_epochs * len(self.indices),)),
            check_array("sample_index", samples, sample_dtype, (plan.num_samples + 1, 2)),
            check_array("shuffle_index", shuffle, shuffle_dtype(plan.num_samples), (plan.num_samples,)),
        ]
        found = [problem for problem in problems if problem]
        if found or plan.num_samples == 0:
            return found[0] if found else None
        lengths = self.dataset.sequence_lengths
        for row in _evenly(plan.num_samples, _CHECKED_SAMPLES):
            (first, begin), (last, end) = samples[row : row + 2].tolist()
            read = documents[first:last]
            if not 0 <= first <= last < len(documents) or documents[first : last + 1].max() >= len(lengths):
                return f"sample {row} lies outside the data"
            num_tokens = int(lengths[read].sum(dtype=numpy.int64)) - begin + end
            is_last = row == plan.num_samples - 1
            if num_tokens != self.config.sequence_length and not (is_last and num_tokens < self.config.sequence_length):
                return f"sample {row} has {num_tokens} tokens: the data has changed since"
        return None

    # -- ids and vocabulary ----------------------------------------------------------------------------

    def _check_some_sequences(self) -> None:
        """Find data of a larger vocabulary early; every sample is checked again when it is read."""
        if self._vocab_size is None or len(self.indices) == 0:
            return
        for place in _evenly(len(self.indices), _CHECKED_SEQUENCES):
            document = int(self.indices[place])
            length = min(int(self.dataset.sequence_lengths[document]), 4096)
            self._check_ids(document, self.dataset.get(document, 0, length))

    def _check_ids(self, document: int, tokens: numpy.ndarray) -> None:
        if tokens.size == 0 or _ids_within(tokens, self._vocab_size):
            return
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(
            f"{self.dataset_path or 'mock data'}: document {document} has token id "
            f"{low if low < 0 else high}, the tokenizer's vocabulary has ids 0 to {self._vocab_size - 1}: "
            "the data was made with another tokenizer"
        )


class MockGPTLowLevelDataset:
    """Made-up sequences: the numbers 1, 2, 3, ... and the end-of-document id, with random but fixed lengths.

    With a vocabulary smaller than the longest sequence the numbers start again before they reach its end.
    """

    seed = 0
    size = 100000
    max_sequence_length = 4096

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        self.tokenizer = tokenizer
        rng = numpy.random.default_rng(seed=self.seed)
        self.sequence_lengths = rng.integers(1, self.max_sequence_length, size=self.size, dtype=numpy.int32)
        vocab_size = _id_or_none(tokenizer, "vocab_size", None)
        self._period = self.max_sequence_length if vocab_size is None else max(vocab_size - 1, 1)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, idx: int) -> numpy.ndarray:
        return self.get(idx)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """`length` tokens of sequence `idx` from token `offset` on, int64."""
        total = int(self.sequence_lengths[idx])
        end = total if length is None else min(offset + length, total)
        tokens = numpy.arange(offset, end, dtype=numpy.int64) % self._period + 1
        if end == total and len(tokens):
            tokens[-1] = self.tokenizer.eod
        return tokens


class MockGPTDataset(GPTDataset):
    """`GPTDataset` over made-up sequences; needs no files."""

    def __init__(
        self,
        dataset: MockGPTLowLevelDataset,
        dataset_path: str | None,
        indices: numpy.ndarray,
        num_samples: int,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        if not config.mock:
            raise ValueError("MockGPTDataset reads no files: give GPTDataset instead, or no blend")
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Number of sequences."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(
        dataset_path: str | None, config: BlendedMegatronDatasetConfig
    ) -> MockGPTLowLevelDataset:
        """The made-up sequences."""
        assert config.tokenizer is not None
        return MockGPTLowLevelDataset(config.tokenizer)


def _evenly(size: int, count: int) -> list[int]:
    """Up to `count` places among `size`, the first and the last of them included."""
    return sorted({i * (size - 1) // (count - 1) for i in range(count)})


@lru_cache(maxsize=8)
def _positions(sequence_length: int) -> torch.Tensor:
    return torch.arange(sequence_length, dtype=torch.int64)


def _ids_within(tokens: numpy.ndarray, vocab_size: int) -> bool:
    return bool(tokens.max() < vocab_size and (tokens.dtype.kind == "u" or tokens.min() >= 0))


def _positions_in_documents(documents: numpy.ndarray) -> numpy.ndarray:
    """[s] int64, distance of each position from the first one of its document."""
    positions = numpy.arange(len(documents), dtype=numpy.int64)
    is_first = numpy.diff(documents, prepend=documents[:1]) != 0
    return positions - numpy.maximum.accumulate(numpy.where(is_first, positions, 0))


def _id_or_none(tokenizer: Any, name: str, default: int | None) -> Any:
    """A tokenizer's property, or `default` where the tokenizer has none."""
    try:
        return getattr(tokenizer, name)
    except (NotImplementedError, AttributeError):
        return default
