"""What a wrapper must know of a model and its use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class InferenceWrapperConfig:
    """Sizes of a model and of what is generated with it."""

    hidden_size: int
    params_dtype: torch.dtype
    """Of what crosses pipeline stages, and of keys and values."""

    inference_batch_times_seqlen_threshold: int
    """Batches of more tokens go through a pipeline in pieces of at most as many, so that its stages work at the same
    time; -1: never."""

    padded_vocab_size: int
    inference_max_requests: int = 8
    inference_max_seq_length: int = 2560
    fp32_residual_connection: bool = False
    nccl_all_reduce_for_prefill: bool = False

    def add_attributes(self, attribute_value_pair: dict[str, Any]) -> None:
        """Set further attributes."""
        for name, value in attribute_value_pair.items():
            setattr(self, name, value)
