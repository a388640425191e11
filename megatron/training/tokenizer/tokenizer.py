"""From the command line's tokenizer settings to a tokenizer."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.tokenizer.null_tokenizer import NullTokenizer

logger = logging.getLogger(__name__)

_NullTokenizer = NullTokenizer  # its public name


@dataclass(frozen=True)
class _Kind:
    """How one tokenizer type is made."""

    module: str
    """Where the class is, in this package; imported when needed, as each needs another library."""
    class_name: str
    """Or the name of a function that makes it."""
    positional: tuple[str, ...]
    """Settings that must be given, in the order of the constructor."""
    options: tuple[str, ...] = ()
    """Settings passed by name, if they are there; "tiktoken_" is left out of the name."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the constructor."""


_PACKAGE = "megatron.training.tokenizer"
_MODEL = ("tokenizer_model",)
_EXTRA_IDS = ("vocab_extra_ids",)
_BERT = ("bert_tokenizer", "BertWordPieceTokenizer", ("vocab_file",), _EXTRA_IDS)

KINDS: dict[str, _Kind] = {
    "BertWordPieceLowerCase": _Kind(*_BERT, fixed={"lower_case": True}),
    "BertWordPieceCase": _Kind(*_BERT, fixed={"lower_case": False}),
    "GPT2BPETokenizer": _Kind("gpt2_bpe_tokenizer", "GPT2BPETokenizer", ("vocab_file", "merge_file"), ("engine",)),
    "SentencePieceTokenizer": _Kind("sentencepiece_tokenizer", "SentencePieceTokenizer", _MODEL, _EXTRA_IDS),
    "GPTSentencePieceTokenizer": _Kind("sentencepiece_tokenizer", "GPTSentencePieceTokenizer", _MODEL),
    "Llama2Tokenizer": _Kind("sentencepiece_tokenizer", "Llama2Tokenizer", _MODEL),
    "HuggingFaceTokenizer": _Kind("huggingface_tokenizer", "HuggingFaceTokenizer", _MODEL),
    "TikTokenizer": _Kind(
        "tik_tokenizer",
        "TikTokenizer",
        ("tokenizer_model", "tiktoken_pattern"),
        ("vocab_size", "tiktoken_num_special_tokens", "tiktoken_special_tokens"),
    ),
    "SFTTokenizer": _Kind("sft_tokenizer", "SFTTokenizer", ("tokenizer_model", "sft_tokenizer_prompt_format")),
    "NullTokenizer": _Kind("null_tokenizer", "NullTokenizer", ("vocab_size",)),
    "NullMultimodalTokenizer": _Kind("null_tokenizer", "NullMultimodalTokenizer", ("vocab_size",)),
    "MultimodalTokenizer": _Kind(
        "multimodal_tokenizer",
        "load_multimodal",
        ("tokenizer_model", "tokenizer_prompt_format"),
        ("special_tokens", "image_tag_type", "force_system_message"),
    ),
}


def build_tokenizer(args: Any, **kwargs: Any) -> MegatronTokenizer:
    """The tokenizer that `args.tokenizer_type` and the settings beside it describe.

    Args:
        args: anything with the attributes of the tokenizer flags; it is not changed. The vocabulary size of
            the model is `vocab_size_with_padding(tokenizer.vocab_size, ...)`.
        kwargs: further options of the tokenizer's class.

    Raises:
        ValueError: the type is unknown, a setting it needs is missing, or its files cannot be read as such.
    """
    kind = _find_kind(args.tokenizer_type)
    positional = [_require(args, name) for name in kind.positional]
    extra_ids = getattr(args, "vocab_extra_ids", 0) or 0
    if extra_ids and "vocab_extra_ids" not in kind.options:
        logger.warning("--vocab-extra-ids %d has no effect on %s", extra_ids, args.tokenizer_type)
    given = {name.removeprefix("tiktoken_"): getattr(args, name) for name in kind.options if hasattr(args, name)}
    module = importlib.import_module(f"{_PACKAGE}.{kind.module}")
    make: Callable[..., MegatronTokenizer] = getattr(module, kind.class_name)
    return make(*positional, **(kind.fixed | given | kwargs))


def vocab_size_with_padding(
    orig_vocab_size: int, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """The vocabulary size rounded up so that every tensor-parallel rank has a multiple of the divisor."""
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-orig_vocab_size // multiple) * multiple


def _find_kind(tokenizer_type: str | None) -> _Kind:
    if tokenizer_type in KINDS:
        return KINDS[tokenizer_type]
    choices = ", ".join(KINDS)
    found = "is not given" if tokenizer_type is None else f"{tokenizer_type} is unknown"
    raise ValueError(f"--tokenizer-type {found}: choose one of {choices}")


def _require(args: Any, name: str) -> Any:
    value = getattr(args, name, None)
    if value is None:
        raise ValueError(f"--tokenizer-type {args.tokenizer_type} needs --{name.replace('_', '-')}")
    return value
