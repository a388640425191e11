"""Drawing tokens with torch's own random stream."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.inference import sampling
from megatron.core.inference.sampling_params import SamplingParams


def sample(
    logits: Tensor, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """[b] int64 on the CPU, drawn from logits [b, v].

    Args:
        vocab_size: no token from this number on is drawn.

    Raises:
        ValueError: top_k and top_p are both given, or a value is out of its range.
    """
    if top_k > 0 and top_p > 0:
        raise ValueError(f"top_k ({top_k}) and top_p ({top_p}) exclude each other: give one of them")
    params = SamplingParams(top_k=top_k, top_p=top_p, temperature=temperature)
    return sampling.sample(logits[:, :vocab_size], [sampling.Draw(params, torch.default_generator)] * len(logits))
