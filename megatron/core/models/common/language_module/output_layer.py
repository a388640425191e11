"""The linear layer between hidden states and the scores of the vocabulary, the same in every language model."""

from __future__ import annotations

from typing import Any

from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


def build_output_layer(
    config: TransformerConfig,
    vocab_size: int,
    *,
    tied: bool,
    pre_process: bool,
    bias: bool = False,
    parallel_output: bool = True,
    tp_group: ProcessGroup | None = None,
    **others: Any,
) -> ColumnParallelLinear:
    """[s, b, h] -> [s, b, vocab_size / tp].

    Args:
        tied: its weight is the embedding's, which then has no copy here if this stage has the embedding
            (`pre_process`): the weight is handed in.
        parallel_output: give this rank's part of the vocabulary instead of gathering all of it.
        others: see `ColumnParallelLinear`.
    """
    assert config.init_method is not None
    return ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=bias,
        skip_bias_add=False,
        gather_output=not parallel_output,
        skip_weight_param_allocation=pre_process and tied,
        tp_group=tp_group,
        **others,
    )
