"""The tokenizer's flags, for programs other than training."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args

from megatron.training.config.data import TokenizerConfig
from megatron.training.config.flags import flag_of
from megatron.training.tokenizer.bpe_engines import EngineName


def add_tokenizer_arguments(parser: Any) -> None:
    """Add what `build_tokenizer` reads to a parser or a group of one."""
    for field in fields(TokenizerConfig):
        flag = flag_of("tokenizer", TokenizerConfig, field.name)
        options: dict[str, Any] = {"choices": flag.choices} if flag.choices else {}
        parser.add_argument(
            *flag.names,
            dest=flag.dest,
            type=flag.type,
            nargs=flag.nargs,
            default=flag.default,
            help=flag.help,
            **options,
        )
    parser.add_argument(
        "--tokenizer-engine",
        dest="engine",
        choices=get_args(EngineName),
        default=argparse.SUPPRESS,
        help="what runs GPT2BPETokenizer, with the same ids (auto: tiktoken where it is installed and follows the "
        "vocabulary, else tokenizers; gigatoken only by name)",
    )
