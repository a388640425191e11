"""One pass after the other over a batch, with a memory of those before. b rows, s tokens of a pass, v vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config


class ForwardStep:
    """Runs a GPT forward, under any layout without context parallelism; all ranks of the model call it alike.

    Args:
        model: this rank's model, with or without its wrappers for training.
        inference_context: a static one; it moves on with each pass.

    Raises:
        ValueError: the context is not static: engines drive those.
    """

    def __init__(self, model: nn.Module, inference_context: BaseInferenceContext) -> None:
        if not inference_context.is_static_batching():
            raise ValueError("a static context is needed, whose rows are all at one position: StaticInferenceContext")
        config = get_model_config(model)
        vocab_size = get_attr_wrapped_model(model, "vocab_size")
        self.model, self.inference_context = model, inference_context
        sizes = InferenceWrapperConfig(config.hidden_size, config.params_dtype, -1, vocab_size)
        self.wrapper = GPTInferenceWrapper(model, sizes, inference_context)

    def __call__(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Any = None, recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        """Logits [b, s, v] of the tokens behind [b, s], without padding of the vocabulary, on the last stage; None
        elsewhere.

        Args:
            attention_mask: None: attention is causal.
            recv_buffer_seq_len: unused: stages know how much they pass on.

        Raises:
            NotImplementedError: there is a mask.
        """
        if attention_mask is not None:
            raise NotImplementedError("attention_mask: a model with a memory sees what came before; leave it out")
        fill = -tokens.size(1) % self.wrapper.token_multiple
        wanted = torch.ones_like(tokens, dtype=torch.bool)
        inputs = {"tokens": tokens, "position_ids": position_ids, "output_positions": wanted}
        logits = self.wrapper.run_one_forward_step({name: pad(value, (0, fill)) for name, value in inputs.items()})
        self.inference_context.increment_sequence_len_offset(tokens.size(1))
        return None if logits is None else logits.view(*tokens.shape, -1)
