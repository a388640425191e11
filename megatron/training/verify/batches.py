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
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + index)
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
