"""Small linear layers that every tensor parallel rank holds whole."""

from __future__ import annotations

import torch
from torch import nn

from megatron.core import device
from megatron.core.tensor_parallel.initialization import register_parameter_init
from megatron.core.transformer.transformer_config import TransformerConfig


def replicated_linear(
    num_inputs: int, num_outputs: int, config: TransformerConfig, *, sees_part_of_sequence: bool = False
) -> nn.Linear:
    """A linear layer with bias 0 and the model's initial weights.

    Args:
        sees_part_of_sequence: each tensor parallel rank runs it on its own tokens, so that its gradients are parts of
            a sum over them.
    """
    layer = nn.utils.skip_init(
        nn.Linear, num_inputs, num_outputs, device=device.current_device(), dtype=config.params_dtype
    )
    assert config.init_method is not None
    for param, init in ((layer.weight, config.init_method), (layer.bias, torch.nn.init.zeros_)):
        param.sequence_parallel = sees_part_of_sequence
        register_parameter_init(param, init, perform_initialization=config.perform_initialization)
    return layer
