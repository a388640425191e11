"""The tokenizer's settings; each field is a flag of training and of the programs that prepare data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TokenizerConfig:
    """Which tokenizer, and its files."""

    vocab_size: int | None = None
    """Size of the vocabulary before padding."""
    vocab_file: str | None = None
    """File with the vocabulary."""
    merge_file: str | None = None
    """File with the merges of a BPE vocabulary."""
    vocab_extra_ids: int = 0
    """Extra tokens that mark spans."""
    tokenizer_type: (
        Literal[
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "GPT2BPETokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "HuggingFaceTokenizer",
            "Llama2Tokenizer",
            "TikTokenizer",
            "MultimodalTokenizer",
            "NullTokenizer",
            "NullMultimodalTokenizer",
            "SFTTokenizer",
        ]
        | None
    ) = None
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """The tokenizer's file or folder, or its name on the hub."""
    tiktoken_pattern: str | None = None
    """How tiktoken splits text: v1 or v2."""
    tiktoken_num_special_tokens: int = 1000
    """Ids that tiktoken reserves."""
    tiktoken_special_tokens: list[str] | None = None
    """Names of tiktoken's special tokens."""
