"""What a small copy of a model with state space layers is made of."""

from __future__ import annotations

import argparse
import math
from typing import Any

from megatron.training.rules.hybrid import layers_of, sizes_of

HEAD_DIM = 8
STATE_DIM = 8
FEWEST_HEADS = 4
SHORTEST = 160
"""Tokens of a sample, at least: more than two chunks of the state space."""


def num_layers(args: argparse.Namespace, chunks: int) -> int:
    """At least one layer of each kind, and as many for each of `chunks` virtual stages."""
    return -(-max(2, len(set(layers_of(args)))) // chunks) * chunks


def sizes(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Settings of the small model: whether ranks share a group of heads decides which code runs, and is kept."""
    kinds = list(dict.fromkeys(layers_of(args)))
    pattern = "".join(kinds[i % len(kinds)] for i in range(layers))
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    groups = sizes_of(args).over_tensor_ranks(tp).groups
    fewest = next(n for n in range(1, groups + 1) if (n > 1, n % cp == 0) == (groups > 1, groups % cp == 0))
    step = math.lcm(fewest, cp)
    heads = step * -(-FEWEST_HEADS // step)
    return {
        "hybrid_override_pattern": pattern,
        "mamba_head_dim": HEAD_DIM,
        "mamba_state_dim": STATE_DIM,
        "mamba_num_groups": fewest * tp,
        "mamba_num_heads": heads * tp,
    }
