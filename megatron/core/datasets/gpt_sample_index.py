"""Which tokens make up each sample of a language-modelling dataset: pure functions of lengths, sizes and
seed.

Documents are put in a random order, one epoch after the other, and read as one stream of tokens. The stream
is cut every `sequence_length` tokens (a sample also sees the first token of the next one, its last label),
and the samples are put in a random order. A last epoch that is used only in part is shuffled apart from the
earlier ones, so that no document of it comes before all documents were seen equally often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from megatron.core.datasets.helpers import build_sample_index

_SMALL_LAST_EPOCH = 0.80  # a last epoch with less than this share of an epoch's samples is shuffled apart


@dataclass(frozen=True)
class SamplePlan:
    """How often the data is read and how many samples that gives."""

    tokens_per_epoch: int
    num_epochs: int
    num_samples: int
    num_samples_before_last_epoch: int | None
    """Samples that are shuffled apart from those of the last epoch; None: all are shuffled together."""

    @property
    def separate_last_epoch(self) -> bool:
        """Whether the last epoch is shuffled on its own."""
        return self.num_samples_before_last_epoch is not None


def plan_samples(
    tokens_per_epoch: int,
    sequence_length: int,
    num_samples: int | None,
    add_extra_token: bool = True,
    drop_last: bool = True,
) -> SamplePlan:
    """Epochs and samples for at least `num_samples` samples (None: one epoch).

    Args:
        tokens_per_epoch: tokens of all documents, at least 1.
        drop_last: leave out a last sample with fewer tokens than the others.
    """
    extra = 1 if add_extra_token else 0
    num_epochs = 1
    if num_samples is not None:
        num_epochs = max(1, -(-(num_samples * sequence_length + extra) // tokens_per_epoch))
    before_last = None
    if num_epochs > 1:
        assert num_samples is not None
        before = ((num_epochs - 1) * tokens_per_epoch - extra) // sequence_length
        per_epoch = (tokens_per_epoch - extra) // sequence_length
        from_last = num_samples - before
        assert 0 <= from_last <= per_epoch + 1, (tokens_per_epoch, sequence_length, num_samples)
        if from_last < int(_SMALL_LAST_EPOCH * per_epoch):
            before_last = before
    num_tokens = num_epochs * tokens_per_epoch - extra
    if drop_last:
        total = num_tokens // sequence_length
    else:  # single precision is part of the sampling rule that existing caches were made with
        total = int(numpy.ceil(numpy.float32(num_tokens) / numpy.float32(sequence_length)))
    return SamplePlan(tokens_per_epoch, num_epochs, total, before_last)


def build_indices(
    plan: SamplePlan,
    sequence_lengths: numpy.ndarray,
    documents: numpy.ndarray,
    sequence_length: int,
    add_extra_token: bool,
    random_seed: int,
) -> dict[str, numpy.ndarray]:
    """The index arrays of a dataset.

    Returns:
        document_index: [epochs * documents] int32, the documents in reading order.
        sample_index: [samples + 1, 2], position in document_index and token offset at which each sample
            starts.
        shuffle_index: [samples], the order in which samples are given out.
    """
    rng = numpy.random.RandomState(random_seed)
    document_index = _shuffle_documents(plan, documents, rng)
    sample_index = build_sample_index(
        sequence_lengths, document_index, sequence_length, plan.num_samples, add_extra_token
    )
    shuffle_index = _shuffle_samples(plan, rng)
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


def shuffle_dtype(num_samples: int) -> type[numpy.number]:
    """Type of the shuffle index."""
    return numpy.int64 if num_samples >= numpy.iinfo(numpy.uint32).max - 1 else numpy.uint32


def _shuffle_documents(plan: SamplePlan, documents: numpy.ndarray, rng: numpy.random.RandomState) -> numpy.ndarray:
    parts = [plan.num_epochs - 1, 1] if plan.separate_last_epoch else [plan.num_epochs]
    shuffled = []
    for num_epochs in parts:
        part = numpy.tile(documents.astype(numpy.int32), num_epochs)
        rng.shuffle(part)
        shuffled.append(part)
    return numpy.concatenate(shuffled)


def _shuffle_samples(plan: SamplePlan, rng: numpy.random.RandomState) -> numpy.ndarray:
    bounds = [0, plan.num_samples]
    if plan.num_samples_before_last_epoch is not None:
        bounds.insert(1, plan.num_samples_before_last_epoch)
    shuffled = []
    for begin, end in zip(bounds[:-1], bounds[1:]):
        part = numpy.arange(begin, end, dtype=shuffle_dtype(plan.num_samples))
        rng.shuffle(part)
        shuffled.append(part)
    return numpy.concatenate(shuffled)
