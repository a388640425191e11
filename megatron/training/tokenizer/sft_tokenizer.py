"""Conversations as token ids, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer
from megatron.training.tokenizer.huggingface_tokenizer import load

IGNORE_INDEX = -100
"""Target of a token that is not learned."""

Turn = dict[str, str]

PROMPT_FORMATS: dict[str, dict[str, Callable[[str], str]]] = {
    "nemotron-h-aligned": {
        "system": lambda text: f"<SPECIAL_10>System\n{text}\n",
        "user": lambda text: f"<SPECIAL_11>User\n{text}\n<SPECIAL_11>Assistant\n",
        "assistant": lambda text: f"{text}\n",
    }
}
"""For each format how a turn reads, by the role of its speaker."""

_PAD_TOKENS = {"nemotron-h-aligned": "<SPECIAL_233>"}
_LEARNED_ROLE = "assistant"


class SFTTokenizer(VocabularyTokenizer):
    """A Hugging Face tokenizer that also knows how to write a conversation down.

    Args:
        tokenizer_path: as of `HuggingFaceTokenizer`; its vocabulary must have the special tokens of the format.
        prompt_format: a name in `PROMPT_FORMATS`.
    """

    def __init__(self, tokenizer_path: str, prompt_format: str) -> None:
        super().__init__(tokenizer_path, prompt_format=prompt_format)
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(
                f"--sft-tokenizer-prompt-format {prompt_format} is unknown: choose one of {', '.join(PROMPT_FORMATS)}"
            )
        self._tokenizer = load(tokenizer_path, {})
        self._format = PROMPT_FORMATS[prompt_format]
        vocab, pad = self._tokenizer.get_vocab(), _PAD_TOKENS[prompt_format]
        if pad not in vocab or self._tokenizer.eos_token_id is None:
            lacks = f"the token {pad}, which pads," if pad not in vocab else "an end-of-sequence token"
            raise ValueError(f"the tokenizer {tokenizer_path} has not {lacks} that {prompt_format} needs")
        eos = self._tokenizer.eos_token_id
        self._set_vocabulary(vocab, eos=eos, eod=eos, pad=vocab[pad])

    def tokenize(self, text: str | list[Turn]) -> list[int]:
        """Ids of a text, or of a conversation."""
        if not isinstance(text, str):
            return self.tokenize_conversation(text, return_target=False).tolist()
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def tokenize_conversation(
        self, conversation: Sequence[Turn], return_target: bool = True, add_generation_prompt: bool = False
    ) -> Any:
        """Ids of all turns in order, int64; with `return_target`, also what is to be learned of them.

        The second array has -100 in the place of everything that the assistant did not say.

        Args:
            add_generation_prompt: ask for an answer at the end; a user's turn does so in any case.

        Raises:
            ValueError: a turn that cannot be, or a text that reads otherwise in parts than as a whole.
        """
        _require_turns(conversation, self._format)
        texts = [self._format[turn["role"]](turn["content"].strip()) for turn in conversation]
        turns = [self.tokenize(text) for text in texts]
        ids = numpy.array([token for turn in turns for token in turn], dtype=numpy.int64)
        if ids.tolist() != self.tokenize("".join(texts)):
            raise ValueError(
                f"the tokenizer joins the end of a turn to the beginning of the next one in {''.join(texts)[:80]!r}: "
                "what the assistant said cannot be told apart"
            )
        if not return_target:
            return ids
        learned = numpy.repeat([turn["role"] == _LEARNED_ROLE for turn in conversation], list(map(len, turns)))
        return ids, numpy.where(learned, ids, IGNORE_INDEX)

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Ids of tokens given by their text."""
        return self._tokenizer.convert_tokens_to_ids(tokens)

    def get_special_tokens(self) -> list[str]:
        """Texts of the special tokens that the vocabulary has."""
        return [str(token) for token in self._tokenizer.get_added_vocab()]

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)


def _require_turns(conversation: Sequence[Turn], known: dict[str, Any]) -> None:
    if not conversation:
        raise ValueError("a conversation has no messages")
    before = None
    for number, turn in enumerate(conversation):
        role, content = turn.get("role"), turn.get("content")
        if role not in known or not isinstance(content, str):
            raise ValueError(
                f"message {number} needs a role ({', '.join(known)}) and a content that is text, it has "
                f"role {role!r} and content of type {type(content).__name__}"
            )
        if role == _LEARNED_ROLE and (before != "user" or not content.strip()):
            what = "follows no message of the user" if before != "user" else "is empty"
            raise ValueError(f"message {number}, of the assistant, {what}")
        before = role
