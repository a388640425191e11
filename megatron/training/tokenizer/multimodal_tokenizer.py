"""Conversations with pictures as token ids, for vision-language models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer
from megatron.training.tokenizer.huggingface_tokenizer import load
from megatron.training.tokenizer.null_tokenizer import IMAGE_TOKEN
from megatron.training.tokenizer.sft_tokenizer import IGNORE_INDEX, Turn

IMAGE_TAGS = {"": ("", ""), "nvlm": ("<Image>", "</Image>"), "internvl": ("<img>", "</img>")}
"""What stands before and after a picture, by `--image-tag-type`."""

_LEARNED_ROLE = "assistant"


@dataclass(frozen=True)
class PromptFormat:
    """How a conversation reads: `start`, then for each turn its head, its text and its end."""

    heads: dict[str, str]
    """By the role of the speaker."""
    ends: dict[str, str]
    pad: str | None
    """The token that pads; None: the tokenizer's own, or the one for unknown text."""
    start: str = ""
    default_system: str | None = None
    """What the system says where a conversation does not begin with it."""


def _uniform(head: str, end: str, pad: str | None, start: str = "", default_system: str | None = None) -> PromptFormat:
    """All roles speak alike; {} in `head` is the role."""
    roles = ("system", "user", "assistant")
    heads, ends = {role: head.format(role) for role in roles}, dict.fromkeys(roles, end)
    return PromptFormat(heads, ends, pad, start, default_system)


_HELPFUL = "You are a helpful assistant."
_CHATML = ("<|im_start|>{}\n", "<|im_end|>\n")
_LLAMA3 = ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>")
PROMPT_FORMATS: dict[str, PromptFormat] = {
    "mistral": PromptFormat(
        {"user": "[INST] ", "assistant": ""}, {"user": " [/INST]", "assistant": "</s>"}, pad=None, start="<s>"
    ),
    "chatml": _uniform(*_CHATML, pad=None),
    "nvlm-yi-34b": _uniform(*_CHATML, pad=None),
    "qwen2p0": _uniform(*_CHATML, pad=None, default_system=_HELPFUL),
    "qwen2p5": _uniform(*_CHATML, pad=None, default_system=_HELPFUL),
    "llama3": _uniform(*_LLAMA3, pad="<|end_of_text|>", start="<|begin_of_text|>"),
    "llama3p1": _uniform(*_LLAMA3, pad="<|finetune_right_pad_id|>", start="<|begin_of_text|>"),
    "nemotron5-aligned": PromptFormat(
        {"system": "<SPECIAL_10>System\n", "user": "<SPECIAL_11>User\n", "assistant": "<SPECIAL_11>Assistant\n"},
        {"system": "\n", "user": "\n", "assistant": "\n"},
        pad="<SPECIAL_233>",
    ),
}
"""By `--tokenizer-prompt-format`."""


class MultimodalTokenizer(VocabularyTokenizer):
    """A Hugging Face tokenizer that writes down conversations in which special tokens stand for pictures.

    Args:
        tokenizer: a tokenizer of `transformers`; the special tokens are added to it.
        prompt_format: a name in `PROMPT_FORMATS`.
        special_tokens: tokens beside those of its vocabulary, such as "<image>".
        image_tag_type: a name in `IMAGE_TAGS`.
        force_system_message: what the system says is always the format's default.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: str,
        special_tokens: Sequence[str] = (IMAGE_TOKEN,),
        image_tag_type: str = "",
        force_system_message: bool = False,
    ) -> None:
        name = getattr(tokenizer, "name_or_path", "")
        super().__init__(name, prompt_format=prompt_format, special_tokens=list(special_tokens), tag=image_tag_type)
        _require_known("--tokenizer-prompt-format", prompt_format, PROMPT_FORMATS)
        _require_known("--image-tag-type", image_tag_type, IMAGE_TAGS)
        self._tokenizer = tokenizer
        self._format = PROMPT_FORMATS[prompt_format]
        self._tags = IMAGE_TAGS[image_tag_type]
        self._force_system_message = force_system_message
        if force_system_message and self._format.default_system is None:
            raise ValueError(f"--force-system-message: the format {prompt_format} has no message of the system")
        self._tokenizer.add_tokens([*special_tokens, *filter(None, self._tags)], special_tokens=True)
        self._set_vocabulary(self._tokenizer.get_vocab(), **self._find_special_ids(prompt_format))

    def _find_special_ids(self, prompt_format: str) -> dict[str, int]:
        tokenizer, pad = self._tokenizer, self._format.pad
        pads = [tokenizer.get_vocab().get(pad)] if pad else [tokenizer.pad_token_id, tokenizer.unk_token_id]
        found = [token for token in pads if token is not None]
        if tokenizer.eos_token_id is None or not found:
            lacks = f"token that pads ({pad or 'pad or unk'})" if not found else "end-of-sequence token"
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no {lacks}, which {prompt_format} needs")
        return {"eos": tokenizer.eos_token_id, "eod": tokenizer.eos_token_id, "pad": found[0]}

    def tokenize(self, text: str | list[Turn]) -> list[int]:
        """Ids of a text, or of a conversation."""
        if not isinstance(text, str):
            return self.tokenize_conversation(text, return_target=False, add_generation_prompt=False).tolist()
        return self._encode(self._with_tags(text))

    def tokenize_conversation(
        self, conversation: Sequence[Turn], return_target: bool, add_generation_prompt: bool
    ) -> Any:
        """Ids of all turns in order, int64; with `return_target`, also what is to be learned of them: what the
        assistant says and how it ends, -100 in the place of everything else.

        Args:
            add_generation_prompt: end with the head of an answer.

        Raises:
            ValueError: a turn that cannot be, or a text that reads otherwise in parts than as a whole.
        """
        pieces = [(self._format.start, False)] if self._format.start else []
        for number, turn in enumerate(self._with_system(conversation)):
            role, content = turn.get("role"), turn.get("content")
            if role not in self._format.heads or not isinstance(content, str):
                raise ValueError(
                    f"message {number} needs a role ({', '.join(self._format.heads)}) and a content that is text, it "
                    f"has role {role!r} and content of type {type(content).__name__}"
                )
            pieces.append((self._format.heads[role], False))
            pieces.append((self._with_tags(content) + self._format.ends[role], role == _LEARNED_ROLE))
        if add_generation_prompt:
            pieces.append((self._format.heads[_LEARNED_ROLE], False))
        encoded = [self._encode(text) for text, _ in pieces]
        ids = numpy.array([token for part in encoded for token in part], dtype=numpy.int64)
        whole = "".join(text for text, _ in pieces)
        if ids.tolist() != self._encode(whole):
            raise ValueError(f"the tokenizer joins parts of {whole[:80]!r}: the answers cannot be told apart")
        if not return_target:
            return ids
        learned = numpy.repeat([is_learned for _, is_learned in pieces], list(map(len, encoded)))
        return ids, numpy.where(learned, ids, IGNORE_INDEX)

    def _with_system(self, conversation: Sequence[Turn]) -> list[Turn]:
        turns = list(conversation)
        if not turns:
            raise ValueError("a conversation has no messages")
        says = turns[0].get("role") == "system"
        if self._format.default_system is not None and (self._force_system_message or not says):
            return [{"role": "system", "content": self._format.default_system}, *turns[says:]]
        return turns

    def _with_tags(self, text: str) -> str:
        before, after = self._tags
        return text.replace(IMAGE_TOKEN, f"{before}{IMAGE_TOKEN}{after}")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The id of a token given by its text, or of each of several."""
        return self._tokenizer.convert_tokens_to_ids(tokens)

    def get_special_tokens(self) -> list[str]:
        """Texts of the special tokens that the vocabulary has."""
        return [str(token) for token in self._tokenizer.get_added_vocab()]

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)


def _require_known(flag: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        choices = ", ".join(repr(choice) for choice in known)
        raise ValueError(f"{flag} {name} is unknown: choose one of {choices}")


def load_multimodal(tokenizer_model: str, prompt_format: str, **options: Any) -> MultimodalTokenizer:
    """The tokenizer in the files of `--tokenizer-model`, with `options` of `MultimodalTokenizer`."""
    return MultimodalTokenizer(load(tokenizer_model, {}), prompt_format, **options)
