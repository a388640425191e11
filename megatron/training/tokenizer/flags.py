"""The tokenizer's flags for programs that prepare data; they start without torch, which the other flags need."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron.training.field_docs import field_docs
from megatron.training.tokenizer.bpe_engines import EngineName
from megatron.training.tokenizer.config import TokenizerConfig


def add_tokenizer_arguments(parser: Any, types: tuple[str, ...] | None = None) -> None:
    """Add what `build_tokenizer` reads to a parser or a group of one.

    Args:
        types: the kinds of tokenizer to choose from. None: all.
    """
    hints, docs = get_type_hints(TokenizerConfig), field_docs(TokenizerConfig)
    for field in fields(TokenizerConfig):
        options = _value_of(hints[field.name])
        if field.name == "tokenizer_type" and types is not None:
            options["choices"] = types
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, default=field.default, help=docs[field.name], **options)
    parser.add_argument(
        "--tokenizer-engine",
        dest="engine",
        choices=get_args(EngineName),
        default=argparse.SUPPRESS,
        help="what runs GPT2BPETokenizer, with the same ids (auto: tiktoken where it is installed and follows the "
        "vocabulary, else tokenizers; gigatoken only by name)",
    )


def _value_of(annotation: Any) -> dict[str, Any]:
    """What may follow a flag whose field has this type."""
    kinds = get_args(annotation) if get_origin(annotation) not in (None, Literal, list) else (annotation,)
    (kind,) = (kind for kind in kinds if kind is not type(None))
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": kind}
