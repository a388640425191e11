"""Running a T5: the encoder over its prompts, the decoder over the texts so far.

b rows, e tokens of the encoder's rows, d tokens of the decoder's, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import device
from megatron.core.inference.contexts import BaseInferenceContext, DynamicInferenceContext, EncoderDecoderContext
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper,
    Inputs,
)
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.utils import unwrap_model


class T5InferenceWrapper(AbstractModelInferenceWrapper):
    """With an `EncoderDecoderContext` each text's prompt goes through the encoder once, and the decoder computes one
    token of each text a pass, since it keeps keys and values.

    Batches of a static engine keep nothing: passes have the decoder's `tokens` [b, d] from the first one on,
    `output_positions` [b, d] bool, and what `prep_inference_input` gives. Without a pipeline the encoder runs once for
    a batch; with one, whose stages pass its output on, each time.

    Args:
        use_local: no effect: masks are of one form here.
    """

    takes_whole_rows = True

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        inference_wrapper_config: InferenceWrapperConfig,
        inference_context: BaseInferenceContext | None = None,
        use_local: bool = False,
    ) -> None:
        super().__init__(model, inference_wrapper_config, inference_context)
        self.use_local = use_local

    def prep_inference_input(
        self, prompts_tokens: Tensor, encoder_prompts: Sequence[str] | None = None, tokenizer: Any = None
    ) -> Inputs:
        """The decoder's `tokens`; `encoder_tokens` [b, e], `encoder_mask` [b, 1, 1, e], True on padding; without a
        pipeline `encoder_output` [e, b, h].

        Raises:
            ValueError: a row has no encoder prompt, or one of no tokens.
        """
        if encoder_prompts is None or len(encoder_prompts) != len(prompts_tokens) or None in encoder_prompts:
            raise ValueError("a T5 takes an encoder prompt for each prompt of the decoder")
        rows = [self.tokenize_encoder_prompt(prompt, tokenizer).tolist() for prompt in encoder_prompts]
        if not all(rows):
            raise ValueError("an encoder prompt is empty; give at least one token")
        inputs = {"tokens": prompts_tokens} | self._encoder_inputs(rows)
        if self.num_stages == 1:
            inputs["encoder_output"] = self._encode(inputs)
        return inputs

    def _encoder_inputs(self, rows: list[list[int]]) -> Inputs:
        """`encoder_tokens` and `encoder_mask`."""
        longest = -(-max(map(len, rows)) // self.token_multiple) * self.token_multiple
        tokens = self.pad_encoder_prompts_tokens(rows, longest, None).to(device.current_device())
        lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
        mask = (torch.arange(longest, device=tokens.device) >= lengths[:, None])[:, None, None, :]
        return {"encoder_tokens": tokens, "encoder_mask": mask}

    def inputs_of(self, context: DynamicInferenceContext | EncoderDecoderContext) -> Inputs:
        """The prompts of new texts, or in a pass without any, a column that stands for them."""
        assert isinstance(context, EncoderDecoderContext), "a T5 takes an EncoderDecoderContext"
        prompts = [sequence.encoder_tokens if context.encodes else [0] for sequence in context.plan.sequences]
        return self._encoder_inputs(prompts) | {
            "tokens": context.current_input_ids(),
            "output_positions": context.output_positions(),
            "context": context,
        }

    @torch.no_grad()
    def _encode(self, inputs: Inputs) -> Tensor:
        self.model.eval()
        mask = inputs["encoder_mask"]
        return self.model(inputs["encoder_tokens"], inputs["tokens"], mask, None, mask, output_encoder_hidden_only=True)

    def tokenize_encoder_prompt(self, encoder_prompt: str, tokenizer: Any) -> Tensor:
        """[n] int64."""
        return torch.tensor([int(token) for token in tokenizer.tokenize(encoder_prompt)], dtype=torch.int64)

    def pad_encoder_prompts_tokens(
        self, encoder_prompts_tokens_list: list[list[int]], max_sequence_length: int, tokenizer: Any
    ) -> Tensor:
        """[b, max_sequence_length] int64, rows filled up on the right; masks hide what with."""
        tokens = torch.zeros(len(encoder_prompts_tokens_list), max_sequence_length, dtype=torch.int64)
        for row, own in zip(tokens, encoder_prompts_tokens_list):
            row[: len(own)] = torch.tensor(own)
        return tokens

    def get_batch_for_context_window(
        self, inference_input: Inputs, context_start_position: int, context_end_position: int
    ) -> Inputs:
        """The first `context_end_position` tokens of the decoder."""
        return inference_input | {"tokens": inference_input["tokens"][:, :context_end_position]}

    def compute(self, chunk: nn.Module, inputs: Inputs) -> Tensor:
        mask, wanted, context = inputs["encoder_mask"], inputs.get("output_positions"), inputs.get("context")
        output = chunk(
            inputs["encoder_tokens"],
            inputs["tokens"],
            mask,
            None,
            mask if context is None else None,
            encoder_hidden_states=inputs.get("encoder_output"),
            inference_context=context,
        )
        gives_logits = getattr(unwrap_model(chunk), "post_process", False)
        return output[wanted].unsqueeze(0) if gives_logits and wanted is not None else output

    def lengths_of_pass(self, inputs: Inputs) -> dict[str, int]:
        """Of the encoder's and of the decoder's rows."""
        return {"seq_length": inputs["encoder_tokens"].size(1), "decoder_seq_length": inputs["tokens"].size(1)}
