"""Running a GPT with a context. b rows, l tokens of a row, s tokens of a pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper,
    Inputs,
)


class GPTInferenceWrapper(AbstractModelInferenceWrapper):
    """Passes have `tokens` and `position_ids` [b, s], and may have `output_positions` [b, s] bool, where logits are
    wanted: the output is [1, n, v] then."""

    def prep_inference_input(self, prompts_tokens: Tensor) -> Inputs:
        """`tokens` and `position_ids` [b, l]."""
        positions = torch.arange(prompts_tokens.size(1), device=prompts_tokens.device)
        return {"tokens": prompts_tokens, "position_ids": positions.expand_as(prompts_tokens)}

    def get_batch_for_context_window(
        self, inference_input: Inputs, context_start_position: int, context_end_position: int
    ) -> Inputs:
        """Columns start, ..., end - 1."""
        window = slice(context_start_position, context_end_position)
        return {name: value[:, window] for name, value in inference_input.items()}

    def compute(self, chunk: nn.Module, inputs: Inputs) -> Tensor:
        return chunk(
            inputs["tokens"],
            inputs["position_ids"],
            None,
            inference_context=self.inference_context,
            output_positions=inputs.get("output_positions"),
        )
