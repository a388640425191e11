import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    MockGPTLowLevelDataset,
)
from megatron.core.datasets.utils import Split
from tests.unit_tests.datasets.data_files import LetterTokenizer, gpt_config, random_documents, write_dataset

EOD = 99


def open_dataset(
    prefix: str, config: GPTDatasetConfig, num_samples: int | None = None, split: Split = Split.train
) -> GPTDataset:
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    indices = numpy.arange(GPTDataset.numel_low_level_dataset(low_level), dtype=numpy.int32)
    return GPTDataset(low_level, prefix, indices, num_samples, split, config)


@pytest.fixture
def documents() -> list[list[int]]:
    return random_documents(30)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_dataset(tmp_path / "corpus", documents)


def stream(dataset: GPTDataset, documents: list[list[int]]) -> list[int]:
    return [token for document in dataset.document_index for token in documents[document]]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("num_samples", [None, 20, 100])
def test_items_are_cut_from_the_stream(
    prefix: str, documents: list[list[int]], mmap: bool, num_samples: int | None
) -> None:
    blend = {"blend": ([prefix], None), "split": "1,0,0"}
    dataset = open_dataset(prefix, gpt_config(**blend, mmap_bin_files=mmap), num_samples)
    tokens = stream(dataset, documents)
    assert len(dataset) == (len(tokens) - 1) // 16 >= (num_samples or 0)
    for k in range(len(dataset)):
        begin = 16 * int(dataset.shuffle_index[k])
        item = dataset[k]
        assert item["tokens"].tolist() == tokens[begin : begin + 16]
        assert item["labels"].tolist() == tokens[begin + 1 : begin + 17]
        assert item["loss_mask"].tolist() == [1.0] * 16
        assert item["position_ids"].tolist() == list(range(16))
        assert torch.equal(item["attention_mask"], ~torch.ones(1, 16, 16, dtype=torch.bool).tril())
    dtypes = {name: value.dtype for name, value in item.items()}
    whole = dict.fromkeys(("tokens", "labels", "position_ids"), torch.int64)
    assert dtypes == whole | {"loss_mask": torch.float32, "attention_mask": torch.bool}


def test_without_extra_token_labels_are_rolled(prefix: str, documents: list[list[int]]) -> None:
    config = gpt_config(blend=([prefix], None), split="1,0,0", add_extra_token_to_sequence=False)
    dataset = open_dataset(prefix, config)
    tokens = stream(dataset, documents)
    assert len(dataset) == len(tokens) // 16
    for k in range(len(dataset)):
        begin = 16 * int(dataset.shuffle_index[k])
        item = dataset[k]
        assert item["tokens"].tolist() == tokens[begin : begin + 16]
        assert item["labels"].tolist() == [*tokens[begin + 1 : begin + 16], 0]
        assert item["loss_mask"].tolist() == [1.0] * 15 + [0.0]


@pytest.mark.parametrize("reset_position_ids", [True, False])
@pytest.mark.parametrize("reset_attention_mask", [True, False])
@pytest.mark.parametrize("eod_mask_loss", [True, False])
def test_ends_of_documents(
    prefix: str, reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
) -> None:
    config = gpt_config(
        blend=([prefix], None),
        split="1,0,0",
        sequence_length=64,
        reset_position_ids=reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        eod_mask_loss=eod_mask_loss,
    )
    dataset = open_dataset(prefix, config)
    num_ends = 0
    for k in range(len(dataset)):
        item = dataset[k]
        positions, mask, loss = list(range(64)), torch.ones(64, 64).tril(), [1.0] * 64
        start = 0
        for i in (item["tokens"] == EOD).nonzero().flatten().tolist():
            num_ends += 1
            if eod_mask_loss:
                loss[i] = 0.0
            if reset_attention_mask:
                mask[i + 1 :, : i + 1] = 0
            if reset_position_ids:
                start = i + 1
                positions[start:] = range(64 - start)
        assert item["loss_mask"].tolist() == loss
        assert item["position_ids"].tolist() == positions
        assert torch.equal(item["attention_mask"], mask[None] < 0.5)
    assert num_ends > 5


def test_partial_validation_sample_is_padded(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[5] * 20])
    config = gpt_config(blend=([prefix], None), split="0,1,0", drop_last_partial_validation_sequence=False)
    dataset = open_dataset(prefix, config, split=Split.valid)
    assert len(dataset) == 2
    items = sorted((dataset[k] for k in range(2)), key=lambda item: -item["loss_mask"].sum())
    assert items[1]["tokens"].tolist() == [5] * 4 + [0] * 12
    assert items[1]["labels"].tolist() == [5] * 3 + [0] * 13
    assert items[1]["loss_mask"].tolist() == [1.0] * 3 + [0.0] * 13
    assert len(open_dataset(prefix, config, split=Split.train)) == 1


def test_pad_token_of_the_tokenizer_gets_no_loss(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[5, 7] * 10])
    config = gpt_config(blend=([prefix], None), split="1,0,0", tokenizer=LetterTokenizer(pad=7))
    item = open_dataset(prefix, config)[0]
    assert item["tokens"].tolist() == [5, 0] * 8 and item["labels"].tolist() == [0, 5] * 8
    assert item["loss_mask"].tolist() == [0.0, 1.0] * 8


def test_items_share_nothing(prefix: str) -> None:
    dataset = open_dataset(prefix, gpt_config(blend=([prefix], None), split="1,0,0"))
    for value in dataset[0].values():
        value.fill_(1)
    fresh = dataset[0]
    assert fresh["position_ids"].tolist() == list(range(16))
    assert not fresh["attention_mask"][0, 5, 5]
    tokens = fresh["tokens"].clone()
    fresh["labels"].zero_()
    assert torch.equal(fresh["tokens"], tokens)


def test_item_none_fills_a_batch(prefix: str) -> None:
    dataset = open_dataset(prefix, gpt_config(blend=([prefix], None), split="1,0,0"))
    item = dataset[None]
    assert torch.equal(item["tokens"], dataset[0]["tokens"])
    assert item["loss_mask"].sum() == 0 and dataset[0]["loss_mask"].sum() == 16


def test_attention_mask_only_on_request(prefix: str) -> None:
    config = gpt_config(blend=([prefix], None), split="1,0,0", create_attention_mask=False, reset_attention_mask=True)
    assert "attention_mask" not in open_dataset(prefix, config)[0]


# -- what is refused -----------------------------------------------------------------------------------


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3], [4, 5]])
    config = gpt_config(blend=([prefix], None), split="1,0,0", sequence_length=8)
    message = r"train split of .*d has 2 of 2 sequences with 5 tokens in all, a sample needs 9"
    for num_samples in (None, 10):
        with pytest.raises(ValueError, match=message):
            open_dataset(prefix, config, num_samples)
    assert len(open_dataset(prefix, config, 0)) == 0


def test_small_validation_split_repeats_with_a_warning(
    prefix: str, documents: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    config = gpt_config(blend=([prefix], None), split="98,1,1", sequence_length=100)
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    one = numpy.array([max(range(30), key=lambda i: len(documents[i]))], dtype=numpy.int32)
    with caplog.at_level(logging.WARNING):
        dataset = GPTDataset(low_level, prefix, one, 3, Split.test, config)
    assert "tokens repeat within a sample" in caplog.text
    assert len(dataset) >= 3
    document = documents[one[0]]
    assert dataset[0]["tokens"].tolist()[: len(document)] in [
        (document * 9)[i : i + len(document)] for i in range(len(document))
    ]
    empty = numpy.array([], dtype=numpy.int32)
    with pytest.raises(ValueError, match="test split .* has 0 of 30 sequences with 0 tokens"):
        GPTDataset(low_level, prefix, empty, 3, Split.test, config)


def test_ids_beyond_the_vocabulary_are_refused_when_opened(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1] * 50, [1] * 20 + [150] + [2] * 20])
    with pytest.raises(ValueError, match=r"d: document 1 has token id 150, .* ids 0 to 99"):
        open_dataset(prefix, gpt_config(blend=([prefix], None), split="1,0,0"))


def test_ids_beyond_the_vocabulary_are_refused_when_read(tmp_path: Path) -> None:
    documents = [[1] * 50 for _ in range(40)]
    documents[17][30] = -3
    prefix = write_dataset(tmp_path / "d", documents, numpy.int32)
    dataset = open_dataset(prefix, gpt_config(blend=([prefix], None), split="1,0,0"))
    with pytest.raises(ValueError, match=r"d: document 17 has token id -3, .* ids 0 to 99"):
        for k in range(len(dataset)):
            dataset[k]


@pytest.mark.parametrize("name", ["tokenizer", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_settings_that_must_be_given(name: str) -> None:
    with pytest.raises(ValueError, match=f"needs {name}"):
        gpt_config(**{name: None})


# -- the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def cached(prefix: str, tmp_path: Path) -> Iterator[tuple[str, GPTDatasetConfig, Path]]:
    config = gpt_config(blend=([prefix], None), split="1,0,0", path_to_cache=str(tmp_path / "cache"))
    assert open_dataset(prefix, config, 20).built_anew_on_cache_miss
    yield prefix, config, tmp_path / "cache"


def test_cache_is_found_again(cached: tuple[str, GPTDatasetConfig, Path]) -> None:
    prefix, config, directory = cached
    dataset = open_dataset(prefix, config, 20)
    assert not dataset.built_anew_on_cache_miss
    start = f"{dataset.unique_description_hash}-GPTDataset-train-"
    names = ("description.txt", "document_index.npy", "manifest.json", "sample_index.npy", "shuffle_index.npy")
    assert sorted(path.name for path in directory.iterdir()) == [start + name for name in names]
    assert (directory / f"{start}description.txt").read_text() == dataset.unique_description
    assert open_dataset(prefix, config, 21).built_anew_on_cache_miss


def test_cache_lies_beside_the_data_by_default(prefix: str) -> None:
    config = gpt_config(blend=([prefix], None), split="1,0,0")
    open_dataset(prefix, config)
    assert len(list((Path(prefix) / "cache" / "GPTDataset_indices").iterdir())) == 5


def test_unique_description(tmp_path: Path, prefix: str) -> None:
    config = gpt_config(blend=([prefix], None), split="99,1,0", path_to_cache=str(tmp_path))
    dataset = open_dataset(prefix, config, 7)
    expected = f"""{{
    "class": "GPTDataset",
    "dataset_path": "{prefix}",
    "num_samples": 7,
    "index_split": "train",
    "random_seed": 1234,
    "sequence_length": 16,
    "split": "99,1,0",
    "split_matrix": [
        [
            0,
            0.99
        ],
        [
            0.99,
            1.0
        ],
        null
    ],
    "tokenizer": {{
        "class": "LetterTokenizer",
        "tokenizer_path": [
            "letters"
        ],
        "pad": "None"
    }}
}}"""
    assert dataset.unique_description == expected


def spoil_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def spoil_header(path: Path) -> None:
    path.write_bytes(b"nothing" + path.read_bytes()[7:])


def spoil_shape(path: Path) -> None:
    numpy.save(path, numpy.load(path)[1:])


def spoil_dtype(path: Path) -> None:
    numpy.save(path, numpy.load(path).astype(numpy.int16))


@pytest.mark.parametrize("spoil", [spoil_cut, spoil_header, spoil_shape, spoil_dtype, os.remove])
@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
def test_damaged_cache_is_built_again(
    cached: tuple[str, GPTDatasetConfig, Path], spoil, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefix, config, directory = cached
    before = {path: path.read_bytes() for path in directory.iterdir()}
    spoil(next(directory.glob(f"*-{name}.npy")))
    dataset = open_dataset(prefix, config, 20)
    assert dataset.built_anew_on_cache_miss
    assert ("is built again" in caplog.text) == (spoil is not os.remove)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_cache_of_changed_data_is_built_again(
    cached: tuple[str, GPTDatasetConfig, Path], documents: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    prefix, config, _ = cached
    write_dataset(Path(prefix), documents[::-1])  # the same counts, other lengths
    dataset = open_dataset(prefix, config, 20)
    assert dataset.built_anew_on_cache_miss
    assert "the data has changed since" in caplog.text


def test_unwritable_cache_is_no_error(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    config = gpt_config(blend=([prefix], None), split="1,0,0", path_to_cache=str(tmp_path / "file" / "cache"))
    assert len(open_dataset(prefix, config)) > 0
    assert "cannot be written" in caplog.text


# -- mock data -----------------------------------------------------------------------------------------


class WideTokenizer(LetterTokenizer):
    @property
    def vocab_size(self) -> int:
        return 50000

    @property
    def eod(self) -> int:
        return 49999


def test_mock_sequences() -> None:
    mock = MockGPTLowLevelDataset(WideTokenizer())
    assert len(mock) == 100000
    assert mock.sequence_lengths[:8].tolist() == [3484, 2609, 2094, 1105, 1261, 168, 309, 68]
    assert mock.sequence_lengths.sum() == 204637097 and mock.sequence_lengths.dtype == numpy.int32
    assert mock[7].tolist() == [*range(1, 68), 49999]
    assert mock.get(7, 3, 4).tolist() == [4, 5, 6, 7]
    assert mock.get(7, 60).tolist() == [61, 62, 63, 64, 65, 66, 67, 49999]


def test_mock_ids_stay_within_a_small_vocabulary() -> None:
    mock = MockGPTLowLevelDataset(LetterTokenizer())
    for i in range(20):
        tokens = mock[i].tolist()
        assert tokens == [*((numpy.arange(len(tokens) - 1) % 99) + 1).tolist(), EOD]


def test_mock_dataset() -> None:
    config = gpt_config(sequence_length=64, tokenizer=WideTokenizer())
    assert config.mock and config.split == "1,1,1"
    low_level = MockGPTDataset.build_low_level_dataset(None, config)
    dataset = MockGPTDataset(low_level, None, numpy.arange(100), 50, Split.train, config)
    assert len(dataset) >= 50
    assert dataset[3]["tokens"].shape == (64,)
    assert '"dataset_path": null' in dataset.unique_description
