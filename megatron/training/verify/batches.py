"""Samples for comparing layouts: random, the same in every layout, with documents and unevenly many valid tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron.training.utils import dense_attention_mask, get_ltor_masks_and_position_ids

MEAN_DOCUMENT = 6
"""Tokens between two ends of a document on average: several documents to a sample, some to a context parallel part."""

VALID_SHARES = (1.0, 0.3, 0.75, 0.05, 0.5, 0.0, 0.15, 0.9)
"""With uneven samples: share of the tokens, from the left, that sample 0, 1, 2, … counts in its loss."""


class RandomDocuments(Dataset):
    """Sample i is a function of (seed, i): random tokens in which documents end at random places.

    Args:
        args: the run's settings; its flags about documents say what the masks and positions are.
        uneven: let samples count unlike many tokens, the rest of the sequence being masked in the loss.
        num_samples: size.
    """

    def __init__(self, args: Any, tokenizer: Any, num_samples: int, *, uneven: bool = False, seed: int = 0) -> None:
        self.args, self.num_samples, self.uneven, self.seed = args, num_samples, uneven, seed
        self.vocab_size, self.eod = tokenizer.vocab_size, tokenizer.eod

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        args = self.args
        generator = _generator(self.seed, index)
        text = torch.randint(self.vocab_size, (1, args.seq_length + 1), generator=generator)
        ends = torch.randint(MEAN_DOCUMENT, text.shape, generator=generator) == 0
        text[ends] = self.eod
        tokens, labels = text[:, :-1], text[:, 1:]
        hidden, loss_mask, positions = get_ltor_masks_and_position_ids(
            tokens, self.eod, args.reset_position_ids, args.reset_attention_mask, args.eod_mask_loss
        )
        if self.uneven:
            loss_mask[:, round(VALID_SHARES[index % len(VALID_SHARES)] * args.seq_length) :] = 0.0
        sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}
        if dense_attention_mask(args):
            sample["attention_mask"] = hidden
        return {name: value[0].contiguous() for name, value in sample.items()}


class RandomMasked(Dataset):
    """Samples as `BERTMaskedWordPieceDataset` makes them, of random tokens: sample i is a function of (seed, i).

    As many tokens are hidden in each, and all are real; with `uneven` the share of real tokens is that of
    `VALID_SHARES`, and of them as many are hidden as chance wants.
    """

    def __init__(self, args: Any, tokenizer: Any, num_samples: int, *, uneven: bool = False, seed: int = 0) -> None:
        self.args, self.num_samples, self.uneven, self.seed = args, num_samples, uneven, seed
        self.vocab_size = tokenizer.vocab_size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator, length = _generator(self.seed, index), self.args.seq_length
        text = torch.randint(self.vocab_size, (length,), generator=generator)
        order = torch.randperm(length, generator=generator)
        hidden = torch.zeros(length, dtype=torch.bool)
        hidden[order[: length // 4]] = True
        real = torch.ones(length, dtype=torch.bool)
        if self.uneven:
            real = torch.arange(length) < _real_tokens(index, length)
        hidden &= real
        mask = torch.randint(self.vocab_size, (), generator=generator)
        return {
            "text": torch.where(hidden, mask, text) * real,
            "types": ((torch.arange(length) >= length // 3) & real).long(),
            "labels": torch.where(hidden, text, -1),
            "is_random": torch.randint(2, (), generator=generator),
            "loss_mask": hidden.long(),
            "padding_mask": real.long(),
        }


class RandomPairs(Dataset):
    """Samples as `T5MaskedWordPieceDataset` makes them, of random tokens: sample i is a function of (seed, i).

    All tokens are real; with `uneven` the encoder's share is that of `VALID_SHARES`, the decoder's the next one.
    """

    def __init__(self, args: Any, tokenizer: Any, num_samples: int, *, uneven: bool = False, seed: int = 0) -> None:
        self.args, self.num_samples, self.uneven, self.seed = args, num_samples, uneven, seed
        self.vocab_size = tokenizer.vocab_size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator, e, d = _generator(self.seed, index), self.args.encoder_seq_length, self.args.decoder_seq_length
        text = torch.randint(self.vocab_size, (e,), generator=generator)
        spelled = torch.randint(self.vocab_size, (d + 1,), generator=generator)
        read, written = torch.ones(e, dtype=torch.int64), torch.ones(d, dtype=torch.int64)
        if self.uneven:
            read[_real_tokens(index, e) :] = 0
            written[_real_tokens(index + 1, d) :] = 0
        return {
            "text_enc": text * read,
            "text_dec": spelled[:-1] * written,
            "labels": torch.where(written == 1, spelled[1:], -1),
            "loss_mask": written,
            "enc_mask": read,
            "dec_mask": written,
        }


SAMPLES_OF_FAMILY: dict[str, type[Dataset]] = {
    "gpt": RandomDocuments,
    "mamba": RandomDocuments,
    "bert": RandomMasked,
    "t5": RandomPairs,
}
"""What the programs of the model families read."""


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + index)


def _real_tokens(index: int, length: int) -> int:
    """Tokens of an uneven sample, at least one."""
    return max(1, round(VALID_SHARES[index % len(VALID_SHARES)] * length))
