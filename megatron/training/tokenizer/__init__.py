"""Tokenizers: text to token ids and back."""

from megatron.training.tokenizer.tokenizer import build_tokenizer, vocab_size_with_padding

__all__ = ["build_tokenizer", "vocab_size_with_padding"]
