"""Datasets of masked language models: published vectors, and what must hold for every sample."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch

from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.datasets.masked_sample_index import SentenceGrouping, build_masked_sample_index
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.mersenne_twister import mt19937_64
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
from megatron.core.datasets.token_masking import NgramMasking, mask_tokens, word_groups
from megatron.core.datasets.utils import Split

PAD, CLS, SEP, MASK, BOS, EOS = 0, 1, 2, 4, 90, 91
VOCAB_SIZE = 100
SENTINELS = list(range(92, 100))
SPECIAL = {CLS, SEP}
CONTINUES = [token % 3 == 0 for token in range(VOCAB_SIZE)]


class WordPieces(MegatronTokenizer):
    """Every third id continues a word."""

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    @property
    def vocab(self) -> dict[str, int]:
        return {text: token for token, text in self.inv_vocab.items()}

    @property
    def inv_vocab(self) -> dict[int, str]:
        return {token: f"##{token}" if CONTINUES[token] else str(token) for token in range(VOCAB_SIZE)}

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    cls, sep, pad, mask, bos, eos = CLS, SEP, PAD, MASK, BOS, EOS
    additional_special_tokens_ids = SENTINELS


COMMON: dict[str, object] = {
    "random_seed": 1234,
    "sequence_length": 32,
    "split": "1,0,0",
    "tokenizer": WordPieces("vocab"),
    "masking_probability": 0.15,
    "short_sequence_probability": 0.1,
    "masking_do_full_word": True,
    "masking_do_permutation": False,
    "masking_use_longer_ngrams": False,
}


def bert_replacement(token: int, rng: numpy.random.RandomState) -> int:
    if rng.random_sample() < 0.8:
        return MASK
    return int(rng.randint(0, VOCAB_SIZE)) if rng.random_sample() >= 0.5 else token


# -- published vectors ---------------------------------------------------------------------------------


def test_twister_gives_the_value_that_the_cpp_standard_names() -> None:
    assert int(mt19937_64(5489, 10000)[-1]) == 9981545732273789042


@pytest.mark.parametrize(
    ("probability", "seed", "min_num_sentences", "expected"),
    [
        (0.1, 1234, 2, "9,12,24 5,9,24 5,9,24 0,4,24 9,12,24 0,4,24 5,9,24 9,12,24 0,4,24"),
        (0.5, 7, 1, "4,5,24 4,5,24 9,12,24 5,9,24 0,4,24 9,12,17 1,4,24 5,9,24 0,1,7"),
    ],
)
def test_published_sample_index(probability: float, seed: int, min_num_sentences: int, expected: str) -> None:
    starts = numpy.array([0, 4, 5, 9, 12])
    lengths = numpy.array([10, 12, 8, 20, 30, 5, 6, 7, 9, 14, 3, 11])
    grouping = SentenceGrouping(24, probability, min_num_sentences, seed)
    index = build_masked_sample_index(starts, lengths, 8, grouping)
    assert index.dtype == numpy.uint32
    assert index.tolist() == [[int(x) for x in row.split(",")] for row in expected.split()]


def test_published_bert_masking() -> None:
    tokens = [CLS, *range(5, 25), SEP, *range(26, 38), SEP]
    words = word_groups(tokens, SPECIAL.__contains__, CONTINUES)
    rng = numpy.random.RandomState(1234)
    masked = mask_tokens(tokens, words, 40, NgramMasking(0.15, 3), bert_replacement, rng)
    assert masked.positions == [6, 7, 8, 22, 23]
    assert masked.labels == [10, 11, 12, 26, 27]
    assert [masked.tokens[i] for i in masked.positions] == [MASK] * 5


def test_published_t5_masking() -> None:
    tokens = list(range(5, 38))
    words = word_groups(tokens, SPECIAL.__contains__, CONTINUES)
    rng = numpy.random.RandomState(1234)
    masked = mask_tokens(tokens, words, 40, NgramMasking(0.15, 10, geometric=True), lambda token, rng: MASK, rng)
    assert [positions for positions, _ in masked.spans] == [[11, 12, 13, 14], [20]]


# -- what must hold for every sample -------------------------------------------------------------------


def test_every_epoch_has_every_sentence_once() -> None:
    generator = random.Random(0)
    sizes = [generator.randrange(0, 7) for _ in range(50)]
    starts = numpy.cumsum([0, *sizes])
    lengths = numpy.array([generator.randrange(1, 30) for _ in range(starts[-1])])
    one = build_masked_sample_index(starts, lengths, 1, SentenceGrouping(40, 0.3, 1, 5))
    covered = sorted(i for first, end, _ in one.tolist() for i in range(first, end))
    assert covered == list(range(len(lengths)))
    assert all(2 <= target <= 40 for target in one[:, 2].tolist())
    document = numpy.repeat(range(50), sizes)
    assert all(len(set(document[first:end])) == 1 for first, end, _ in one.tolist())


def test_long_sentences_and_short_documents_are_left_out() -> None:
    lengths = numpy.array([600, 5, 5, 5, 600])
    index = build_masked_sample_index(numpy.array([0, 2, 4, 5]), lengths, 1, SentenceGrouping(40, 0.0, 1, 5))
    assert sorted(index[:, :2].tolist()) == [[2, 4], [4, 5]]
    with pytest.raises(ValueError, match="split into sentences"):
        build_masked_sample_index(numpy.array([0, 1, 2]), lengths[1:3], 1, SentenceGrouping(40, 0.0, 2, 5))


def test_permutation_moves_tokens_and_asks_for_them() -> None:
    tokens = list(range(5, 85))
    words = word_groups(tokens, SPECIAL.__contains__, CONTINUES)
    masking = NgramMasking(0.15, 3, permutation=True)
    masked = mask_tokens(tokens, words, 80, masking, lambda token, rng: MASK, numpy.random.RandomState(3))
    hidden = {position for positions, _ in masked.spans for position in positions}
    moved = [position for position in masked.positions if position not in hidden]
    assert moved
    assert sorted(masked.tokens[i] for i in moved) == [tokens[i] for i in moved]
    assert masked.labels == [tokens[i] for i in masked.positions]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("sentences") / "corpus"
    generator = random.Random(1)
    builder = IndexedDatasetBuilder(get_bin_path(str(path)), dtype=DType.optimal_dtype(VOCAB_SIZE))
    for _ in range(40):
        sentences = [
            [generator.randrange(5, 90) for _ in range(generator.randrange(1, 20))]
            for _ in range(generator.randrange(1, 8))
        ]
        builder.add_document(
            torch.tensor([token for sentence in sentences for token in sentence]), [len(s) for s in sentences]
        )
    builder.finalize(get_idx_path(str(path)))
    return str(path)


def bert(prefix: str, *, num_documents: int | None = None, **changes: object) -> BERTMaskedWordPieceDataset:
    settings = {
        **COMMON,
        "blend": ([prefix], None),
        "masking_max_ngram": 3,
        "masking_use_geometric_distribution": False,
        "classification_head": True,
    }
    config = BERTMaskedWordPieceDatasetConfig(**(settings | changes))  # type: ignore[arg-type]
    data = BERTMaskedWordPieceDataset.build_low_level_dataset(prefix, config)
    documents = numpy.arange(BERTMaskedWordPieceDataset.numel_low_level_dataset(data), dtype=numpy.int32)[
        :num_documents
    ]
    return BERTMaskedWordPieceDataset(data, prefix, documents, 150, Split.train, config)


@pytest.mark.parametrize("classification_head", [True, False])
def test_bert_items(prefix: str, classification_head: bool) -> None:
    dataset = bert(prefix, classification_head=classification_head)
    assert len(dataset) >= 150
    swapped = masks = hidden = 0
    for k in range(len(dataset)):
        item = dataset[k]
        length = int(item["padding_mask"].sum())
        assert item["padding_mask"].tolist() == [1] * length + [0] * (32 - length)
        original = numpy.where(item["loss_mask"] == 1, item["labels"], item["text"])[:length].tolist()
        assert original[0] == CLS and original[-1] == SEP
        assert original.count(SEP) == (2 if classification_head else 1)
        assert set(item["labels"][item["loss_mask"] == 0]) == {-1}
        first, end, _ = dataset.sample_index[k].tolist()
        text = [token for i in range(first, end) for token in dataset.dataset[i].tolist()]
        border = original.index(SEP)
        a, b = original[1:border], original[border + 1 : -1]
        if item["is_random"]:
            a, b = b, a
        if not item["truncated"]:
            assert a + b == text
        assert item["types"].tolist() == [0] * (border + 1) + [1] * (length - border - 1) + [0] * (32 - length)
        swapped += item["is_random"]
        hidden += int(item["loss_mask"].sum())
        masks += int((item["text"] == MASK).sum())
    if classification_head:
        assert 0.35 < swapped / len(dataset) < 0.65
    else:
        assert swapped == 0
    assert 0.7 < masks / hidden < 0.9


def test_bert_items_depend_on_seed_and_index_alone(prefix: str) -> None:
    one, again, other = bert(prefix), bert(prefix), bert(prefix, random_seed=4321)
    assert not again.built_anew_on_cache_miss
    for name, value in one[7].items():
        assert numpy.array_equal(value, again[7][name])
    assert not numpy.array_equal(one.sample_index, other.sample_index)


def t5(prefix: str, **changes: object) -> T5MaskedWordPieceDataset:
    settings = {
        **COMMON,
        "blend": ([prefix], None),
        "masking_max_ngram": 10,
        "masking_use_geometric_distribution": True,
        "sequence_length_decoder": 16,
    }
    config = T5MaskedWordPieceDatasetConfig(**(settings | changes))  # type: ignore[arg-type]
    data = T5MaskedWordPieceDataset.build_low_level_dataset(prefix, config)
    documents = numpy.arange(T5MaskedWordPieceDataset.numel_low_level_dataset(data), dtype=numpy.int32)
    return T5MaskedWordPieceDataset(data, prefix, documents, 60, Split.train, config)


def test_t5_items_spell_out_what_is_hidden(prefix: str) -> None:
    dataset = t5(prefix)
    for k in range(len(dataset)):
        item = dataset[k]
        encoder = item["text_enc"][item["enc_mask"] == 1].tolist()
        decoder = item["text_dec"][item["dec_mask"] == 1].tolist()
        labels = item["labels"][item["loss_mask"] == 1].tolist()
        assert decoder[0] == BOS and labels[-1] == EOS and decoder[1:] == labels[:-1]
        spelled: dict[int, list[int]] = {}
        for token in labels[:-1]:
            if token in SENTINELS:
                run = spelled.setdefault(token, [])
            else:
                run.append(token)
        assert list(spelled) == SENTINELS[: len(spelled)] and all(spelled.values())
        restored = [t for token in encoder for t in (spelled[token] if token in SENTINELS else [token])]
        first, end, target = dataset.sample_index[k].tolist()
        assert restored == [t for i in range(first, end) for t in dataset.dataset[i].tolist()][:target]
        assert set(item["labels"][item["loss_mask"] == 0]) <= {-1}


def test_t5_says_what_does_not_fit(prefix: str) -> None:
    with pytest.raises(ValueError, match="--decoder-seq-length"):
        dataset = t5(prefix, sequence_length_decoder=3)
        [dataset[k] for k in range(len(dataset))]
    with pytest.raises(ValueError, match="sequence_length_decoder"):
        t5(prefix, sequence_length_decoder=None)


def test_t5_attention_masks() -> None:
    encoder, decoder = torch.tensor([[5, 6, 0]]), torch.tensor([[7, 0]])
    real = (encoder > 0).long(), (decoder > 0).long()
    own, causal, cross = T5MaskedWordPieceDataset.config_attention_mask(encoder, decoder, *real, use_local=True)
    assert own[0, 0].tolist() == [[False, False, True], [False, False, True], [True] * 3]
    assert causal[0, 0].tolist() == [[False, True], [True, True]]
    assert cross[0, 0].tolist() == [[False, False, True], [True] * 3]
    own, causal, cross = T5MaskedWordPieceDataset.config_attention_mask(encoder, decoder, *real)
    assert own.tolist() == [[[[False, False, True]]]] and causal is None and len(cross) == 2


def test_settings_are_checked(prefix: str) -> None:
    with pytest.raises(ValueError, match="masking_max_ngram"):
        bert(prefix, masking_max_ngram=None)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bert(prefix, masking_probability=1.5)
    with pytest.raises(ValueError, match="classification_head"):
        bert(prefix, classification_head=None)


def test_a_split_that_gives_no_sample_is_named(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train split of .*corpus has none of its 40 documents, 150 samples are to be"):
        bert(prefix, num_documents=0, random_seed=77)  # of which no index is kept
    path = str(tmp_path / "whole")
    builder = IndexedDatasetBuilder(get_bin_path(path), dtype=DType.optimal_dtype(VOCAB_SIZE))
    builder.add_document(torch.tensor([7, 8, 9]), [3])
    builder.finalize(get_idx_path(path))
    with pytest.raises(ValueError, match=r"train split of .*whole: no document has .* split into sentences"):
        bert(path)
