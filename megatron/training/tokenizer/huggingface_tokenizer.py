"""Tokenizers in the files of the Hugging Face libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer


class HuggingFaceTokenizer(VocabularyTokenizer):
    """What `transformers.AutoTokenizer` reads, or a `tokenizer.json` alone, with its own special tokens.

    Args:
        pretrained_model_name_or_path: folder, name on the hub, or `tokenizer.json` file.
        options: passed on to `AutoTokenizer.from_pretrained`.
    """

    identifier = "_HuggingFaceTokenizer"

    def __init__(self, pretrained_model_name_or_path: str, **options: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **options)
        self._tokenizer = load(pretrained_model_name_or_path, options)
        ids = {name: getattr(self._tokenizer, f"{name}_token_id") for name in ("eos", "bos", "cls", "sep", "mask")}
        special_ids = {name: token for name, token in ids.items() if token is not None}
        if "eos" in special_ids:
            special_ids["eod"] = special_ids["eos"]
        vocabulary = self._tokenizer.get_vocab()
        self._set_vocabulary(vocabulary, **special_ids)
        names = takewhile(vocabulary.__contains__, map("<extra_id_{}>".format, count()))
        self._sentinel_ids = [vocabulary[name] for name in names] or None

    def tokenize(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer(text, verbose=False, **options).input_ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, verbose=False, return_attention_mask=False).input_ids

    def detokenize(self, ids: numpy.ndarray | Iterable[int], **options: Any) -> str:
        return self._tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False, **options)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        found = self._tokenizer(text, verbose=False, return_offsets_mapping=True)
        starts = [begin for begin, _ in found["offset_mapping"]]
        if list(ids[: len(starts)]) != found.input_ids or len(ids) > len(starts) + 1:
            raise ValueError(f"the {len(ids)} ids are not those of the text, which has {len(starts)} tokens")
        return starts + [len(text)] * (len(ids) - len(starts))  # an end of document after the text

    @property
    def chat_tokens(self) -> Callable[[list[dict[str, Any]]], list[int]] | None:
        """(messages) -> tokens of a prompt for the assistant's next message; None if there is no chat template."""
        if self._tokenizer.chat_template is None:
            return None
        return lambda messages: self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)


def load(path: str, options: dict[str, Any]) -> Any:
    """What the Hugging Face libraries make of a folder, file or name.

    Raises:
        RuntimeError: transformers is not installed.
        ValueError: they cannot read it.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    settings = Path(path) / "tokenizer_config.json"
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError("HuggingFaceTokenizer needs the package transformers: pip install transformers") from error
    try:
        if file.is_file() and not settings.is_file():
            return transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(file), **(_guess_special_tokens(file) | options)
            )
        return transformers.AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # the libraries raise OSError, ValueError, plain Exception and others
        raise ValueError(f"{path} cannot be read as a Hugging Face tokenizer: {error}") from error


_NAMES = {
    "eos_token": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"),
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>"),
}


def _guess_special_tokens(file: Path) -> dict[str, str]:
    """The usual names of special tokens, as far as a bare `tokenizer.json` has tokens of these names."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"].get("vocab", {})
    known = {token["content"] for token in content.get("added_tokens", [])}
    known |= set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    found = {kind: [name for name in names if name in known] for kind, names in _NAMES.items()}
    return {kind: names[0] for kind, names in found.items() if names}
