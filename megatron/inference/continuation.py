"""The text of new tokens as it continues the text before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LOOK_BACK = 8
"""Tokens before that decide how the text behind them begins."""


def text_behind(detokenize: Callable[[list[int]], str], before: Sequence[int]) -> Callable[[Sequence[int]], str]:
    """(tokens) -> their text behind the tokens `before`: alone, many tokenizers give it without its first space."""
    known = list(before[-LOOK_BACK:])
    text = detokenize(known)

    def continuation(tokens: Sequence[int]) -> str:
        whole = detokenize([*known, *tokens])
        return whole[len(text) :] if whole.startswith(text) else detokenize(list(tokens))

    return continuation
