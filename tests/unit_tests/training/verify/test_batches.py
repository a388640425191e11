"""Samples for comparing layouts have the form in which the programs read their data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

import pretrain_bert
import pretrain_t5
from megatron.training.verify.batches import SAMPLES_OF_FAMILY, VALID_SHARES

ARGS = SimpleNamespace(seq_length=24, encoder_seq_length=24, decoder_seq_length=10)
TOKENIZER = SimpleNamespace(vocab_size=50)
KEYS = {"bert": pretrain_bert.BATCH_KEYS, "t5": pretrain_t5.BATCH_KEYS}


def samples(family: str, *, uneven: bool, seed: int = 3) -> Any:
    kind: Any = SAMPLES_OF_FAMILY[family]
    return kind(ARGS, TOKENIZER, len(VALID_SHARES), uneven=uneven, seed=seed)


@pytest.mark.parametrize("family", list(KEYS))
def test_samples_are_integers_that_depend_on_seed_and_number(family: str) -> None:
    some = samples(family, uneven=True)
    assert set(some[0]) == set(KEYS[family])
    batch = default_collate([some[i] for i in range(len(some))])
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    again, other = samples(family, uneven=True), samples(family, uneven=True, seed=4)
    text = KEYS[family][0]
    assert torch.equal(some[2][text], again[2][text])
    assert not torch.equal(some[2][text], other[2][text])


@pytest.mark.parametrize("uneven", [False, True])
def test_hidden_tokens_of_bert(uneven: bool) -> None:
    batch = default_collate([samples("bert", uneven=uneven)[i] for i in range(8)])
    hidden, real = batch["loss_mask"] == 1, batch["padding_mask"] == 1
    assert torch.equal(hidden, batch["labels"] >= 0)
    assert not (hidden & ~real).any() and (batch["text"] * ~real == 0).all()
    lengths = real.sum(1)
    assert (lengths == 24).all() if not uneven else lengths.min() == 1 and lengths.max() == 24
    assert uneven or (hidden.sum(1) == 6).all()


@pytest.mark.parametrize("uneven", [False, True])
def test_sequences_of_t5(uneven: bool) -> None:
    batch = default_collate([samples("t5", uneven=uneven)[i] for i in range(8)])
    assert torch.equal(batch["labels"] >= 0, batch["loss_mask"] == 1)
    assert torch.equal(batch["dec_mask"], batch["loss_mask"])
    read, written = batch["enc_mask"].sum(1), batch["dec_mask"].sum(1)
    assert (read >= 1).all() and (written >= 1).all()
    assert uneven != ((read == 24).all() and (written == 10).all()).item()
    whole = written == 10  # there the labels are what the decoder is shown next
    assert whole.any() and torch.equal(batch["labels"][whole, :-1], batch["text_dec"][whole, 1:])
