"""The output layer's weight gradients, postponed to the time in which the last stage would only wait for the others.

Its product is that of the whole vocabulary, the largest of the last stage. `config.defer_embedding_wgrad_compute`
leaves it in the model's `output_weight_grads` for `config.wgrad_deferral_limit` microbatches (0: all of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron.core.tensor_parallel.weight_grad_queue import WeightGradQueue
from megatron.core.utils import get_attr_wrapped_model


def clear_embedding_activation_buffer(config: Any, model: Sequence[nn.Module]) -> nn.Module | None:
    """The chunk that holds the output layer, whose queue is emptied; None if nothing is postponed here."""
    if not config.defer_embedding_wgrad_compute:
        return None
    for chunk in model:
        module = _holder(chunk)
        if module is not None:
            module.output_weight_grads.clear()  # type: ignore[union-attr, operator]
            return module
    return None


def finish_embedding_wgrad_compute(config: Any, embedding_module: nn.Module | None) -> None:
    """Compute what `embedding_module`, from `clear_embedding_activation_buffer`, has postponed."""
    if config.defer_embedding_wgrad_compute and embedding_module is not None:
        queue = embedding_module.output_weight_grads
        assert isinstance(queue, WeightGradQueue)
        queue.run()


def finish_output_weight_grads(config: Any, chunks: Sequence[nn.Module]) -> None:
    """Compute what any chunk of this rank has postponed."""
    if config.defer_embedding_wgrad_compute:
        for chunk in chunks:
            finish_embedding_wgrad_compute(config, _holder(chunk))


def _holder(chunk: nn.Module) -> nn.Module | None:
    try:
        module = get_attr_wrapped_model(chunk, "output_weight_grads", return_model_obj=True)
    except RuntimeError:  # a model without such a layer
        return None
    return module if module.output_weight_grads is not None else None
