"""Samples for pretraining T5: runs of tokens replaced by sentinels, which the decoder has to spell out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from megatron.core.datasets.masked_dataset import MaskedWordPieceDataset, MaskedWordPieceDatasetConfig, padded
from megatron.core.datasets.masked_sample_index import SentenceGrouping
from megatron.core.datasets.token_masking import Masked

_NO_LABEL = -1


@dataclass
class T5MaskedWordPieceDatasetConfig(MaskedWordPieceDatasetConfig):
    """Settings of `T5MaskedWordPieceDataset`."""

    sequence_length_encoder: int | None = field(init=False, default=None)
    """Tokens of the encoder's input; `sequence_length`."""

    sequence_length_decoder: int | None = None
    """Tokens of the decoder's input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sequence_length_encoder = self.sequence_length
        if not self.sequence_length_decoder or self.sequence_length_decoder < 1:
            raise ValueError(f"sequence_length_decoder must be at least 1, got {self.sequence_length_decoder}")
        assert self.tokenizer is not None
        if not getattr(self.tokenizer, "additional_special_tokens_ids", None):
            raise ValueError("T5 needs sentinel tokens: give the tokenizer some with --vocab-extra-ids (100, say)")


class T5MaskedWordPieceDataset(MaskedWordPieceDataset):
    """Samples of an encoder and a decoder.

    An item is a dictionary of numpy arrays, int64; e and d are the encoder's and the decoder's lengths:

    - text_enc: [e] the text with a sentinel for each hidden run. enc_mask: [e] 1 on real tokens.
    - text_dec: [d] bos, then for each run its sentinel and its tokens. dec_mask: [d] 1 on real tokens.
    - labels: [d] the same without bos, then eos; -1 on padding. loss_mask: [d] 1 on labels.
    - truncated: scalar, 1 where tokens of the text were left out.

    Raffel et al., arXiv:1910.10683, 3.1.4.
    """

    config: T5MaskedWordPieceDatasetConfig

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MaskedWordPieceDataset._key_config_attributes(), "sequence_length_decoder"]

    def _grouping(self) -> SentenceGrouping:
        assert self.config.short_sequence_probability is not None
        return SentenceGrouping(
            target_length=self.config.sequence_length - 2,
            short_sequence_probability=self.config.short_sequence_probability,
            min_num_sentences=1,
            seed=self.config.random_seed,
        )

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sentences, target_length, rng = self._sentences(idx)
        text = numpy.concatenate(sentences)
        truncated = len(text) > target_length
        masked = self._mask(text[:target_length].tolist(), target_length, rng)
        encoder, spelled = self._with_sentinels(masked)
        e, d = self.config.sequence_length, self.config.sequence_length_decoder
        tokenizer = self.config.tokenizer
        assert d is not None and tokenizer is not None
        if len(spelled) + 1 > d:
            raise ValueError(
                f"{self.dataset_path}: sample {idx} has {len(spelled) + 1} tokens for the decoder, which takes {d}: "
                f"raise --decoder-seq-length or lower --mask-prob ({self.config.masking_probability})"
            )
        labels = padded([*spelled, tokenizer.eos], d, _NO_LABEL)
        return {
            "text_enc": padded(encoder, e, tokenizer.pad),
            "text_dec": padded([tokenizer.bos, *spelled], d, tokenizer.pad),
            "labels": labels,
            "loss_mask": padded([1] * (len(spelled) + 1), d, 0),
            "truncated": int(truncated),
            "enc_mask": padded([1] * len(encoder), e, 0),
            "dec_mask": padded([1] * (len(spelled) + 1), d, 0),
        }

    def _with_sentinels(self, masked: Masked) -> tuple[list[int], list[int]]:
        """The text with each hidden run replaced by a sentinel, and the sentinels with what they stand for."""
        sentinels = list(self.config.tokenizer.additional_special_tokens_ids)  # type: ignore[union-attr]
        if len(masked.spans) > len(sentinels):
            raise ValueError(
                f"{len(masked.spans)} hidden runs in a sample, but only {len(sentinels)} sentinel tokens: raise "
                "--vocab-extra-ids"
            )
        encoder: list[int] = []
        spelled: list[int] = []
        end = 0
        for sentinel, (positions, originals) in zip(sentinels, masked.spans):
            encoder += [*masked.tokens[end : positions[0]], sentinel]
            spelled += [sentinel, *originals]
            end = positions[-1] + 1
        return encoder + masked.tokens[end:], spelled

    def _replacement(self, token: int, rng: numpy.random.RandomState) -> int:
        assert self.config.tokenizer is not None
        return self.config.tokenizer.mask

    @staticmethod
    def config_attention_mask(
        encoder_tokens: torch.Tensor,
        decoder_tokens: torch.Tensor,
        encoder_mask: torch.Tensor,
        decoder_mask: torch.Tensor,
        use_local: bool = False,
        test_te_version: str | None = None,
    ) -> tuple[Any, Any, Any]:
        """Attention masks of a batch, True where attention is not allowed: (encoder, decoder, decoder to encoder).

        Args:
            encoder_tokens, decoder_tokens: [b, e] and [b, d].
            encoder_mask, decoder_mask: [b, e] and [b, d], 1 (or True) on real tokens.
            use_local: full masks [b, 1, queries, keys] for attention in plain torch; otherwise those of Transformer
                Engine: [b, 1, 1, e], None (causal), and the pair of both padding masks.
        """
        if not use_local:
            padding = encoder_mask < 0.5, decoder_mask < 0.5
            encoder, decoder = padding[0][:, None, None, :], padding[1][:, None, None, :]
            return encoder, None, (decoder, encoder)
        real_encoder, real_decoder = encoder_tokens >= 1, decoder_tokens >= 1
        d = decoder_tokens.shape[1]
        causal = torch.ones(d, d, dtype=torch.bool, device=decoder_tokens.device).tril()
        return (
            ~_pairs(real_encoder, real_encoder),
            ~(_pairs(real_decoder, real_decoder) & causal),
            ~_pairs(real_decoder, real_encoder),
        )


def _pairs(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[b, 1, queries, keys], True where both tokens are real."""
    return (queries[:, :, None] & keys[:, None, :])[:, None]
