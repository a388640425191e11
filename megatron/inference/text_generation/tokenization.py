"""Texts of tokens, by the tokenizer of the run. b rows, s tokens."""

from __future__ import annotations

from torch import Tensor

from megatron.training import get_tokenizer


def detokenize_generations(
    tokens_gpu_tensor: Tensor, lengths_gpu_tensor: Tensor, detokenize_segments: bool
) -> tuple[list[list[int]], list[str]] | tuple[list[list[int]], list[str], list[list[str]]]:
    """(tokens, texts), and with `detokenize_segments` the text of each token.

    Args:
        tokens_gpu_tensor: [b, s].
        lengths_gpu_tensor: [b] how many of a row's tokens count.
    """
    tokenizer = get_tokenizer()
    rows = [row[:length] for row, length in zip(tokens_gpu_tensor.tolist(), lengths_gpu_tensor.tolist())]
    texts = [tokenizer.detokenize(row) for row in rows]
    if not detokenize_segments:
        return rows, texts
    return rows, texts, [[tokenizer.detokenize([token]) for token in row] for row in rows]
