"""Whether a checkpoint speaks the tokenizer's language."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.training.checkpoint.find import candidates, open_candidate, read_common, saved_args
from megatron.training.global_vars import get_tokenizer
from megatron.training.settings import refuse_unless
from megatron.training.tokenizer import vocab_size_with_padding


def require_same_tokenizer(args: Any, load_arg: str) -> None:
    """All ranks call this.

    Raises:
        CheckpointingException: the checkpoint was trained with another kind of tokenizer, or another vocabulary.
    """
    on_first_rank(f"cannot use {getattr(args, load_arg)}", lambda: _compare(args, load_arg, get_tokenizer()))


def _compare(args: Any, load_arg: str, tokenizer: Any) -> None:
    any_format = argparse.Namespace(**{**vars(args), "auto_detect_ckpt_format": True})
    options = candidates(any_format, load_arg)
    saved = saved_args(read_common(open_candidate(any_format, options[0]))) if options else None
    if saved is None:
        return
    kind, padded = getattr(saved, "tokenizer_type", None), getattr(saved, "padded_vocab_size", None)
    refuse_unless(
        kind is None or kind == args.tokenizer_type,
        f"the model was trained with --tokenizer-type {kind}, this run has {args.tokenizer_type}",
    )
    expected = vocab_size_with_padding(
        tokenizer.vocab_size,
        getattr(saved, "make_vocab_size_divisible_by", args.make_vocab_size_divisible_by),
        getattr(saved, "tensor_model_parallel_size", 1),
    )
    refuse_unless(
        padded is None or padded == expected,
        f"the model was trained with a vocabulary of {padded} tokens with padding; this run's tokenizer has "
        f"{tokenizer.vocab_size}, {expected} with padding: it is not the tokenizer that the model was trained with",
    )
