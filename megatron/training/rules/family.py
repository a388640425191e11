"""What the programs of some model families cannot do, however right it is for others."""

from __future__ import annotations

import argparse

from megatron.training.settings import refuse_unless

_NOT_FOR_ENCODERS = (
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
    "mock_data",
    "calculate_per_token_loss",
)


def require_what_an_encoder_can_do(args: argparse.Namespace) -> None:
    """A masked language model reads sentences, has each sequence on one rank, and takes the mean loss itself."""
    if args.model_family != "bert":
        return
    refuse_unless(
        args.context_parallel_size == 1,
        f"--context-parallel-size {args.context_parallel_size}: pretrain_bert.py does not split sequences; use "
        "--tensor-model-parallel-size with --sequence-parallel for long ones",
    )
    for name in _NOT_FOR_ENCODERS:
        refuse_unless(not getattr(args, name), f"--{name.replace('_', '-')} has no meaning for pretrain_bert.py")


FAMILY_RULES = (require_what_an_encoder_can_do,)
