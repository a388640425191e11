"""A small complete command line that tests vary."""

from __future__ import annotations

from typing import Any

from megatron.training.arguments import parse_args, validate_args
from megatron.training.settings import Settings

SMALL_GPT = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--micro-batch-size 2 --tokenizer-type NullTokenizer --vocab-size 100 --train-iters 10 --lr 1e-3 "
    "--mock-data"
)
SAMPLES = SMALL_GPT.replace("--train-iters 10", "--train-samples 100")
REAL_DATA = SMALL_GPT.replace("--mock-data", "")


def parsed(flags: str = "", base: str = SMALL_GPT) -> Settings:
    """The settings of a small GPT with more flags, not yet checked."""
    return parse_args(argv=[*base.split(), *flags.split()])


def validated(flags: str = "", *, world_size: int = 1, base: str = SMALL_GPT, **defaults: Any) -> Settings:
    """The checked settings of a small GPT with more flags, on `world_size` ranks."""
    args = parsed(flags, base)
    args.world_size = world_size
    validate_args(args, defaults)
    return args


def varied(flags: str = "", **values: Any) -> Settings:
    """Settings that are checked, and then changed: for rules that stand behind a capability not built yet."""
    return validated(flags).variant(**values)
