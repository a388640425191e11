"""Requests that have a prompt for an encoder besides the decoder's. b rows, l tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron.core import device
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController


class EncoderDecoderTextGenerationController(TextGenerationController):
    """The controller of a `T5InferenceWrapper`; each request has an `encoder_prompt`, and its prompt is the decoder's
    first tokens, at least one."""

    def prep_inference_input(
        self, prompts_tokens: Tensor, active_requests: OrderedDict[str, InferenceRequest]
    ) -> dict[str, Any]:
        """As of the wrapper, with the encoder prompts of the requests."""
        encoder_prompts = [request.encoder_prompt for request in active_requests.values()]
        return self.inference_wrapped_model.prep_inference_input(  # type: ignore[call-arg]
            prompts_tokens, encoder_prompts=encoder_prompts, tokenizer=self.tokenizer
        )

    def constant_inputs(
        self, prompts: Sequence[Sequence[int]], active_requests: OrderedDict[str, InferenceRequest]
    ) -> dict[str, Any]:
        longest = -(-max(map(len, prompts)) // self.inference_wrapped_model.token_multiple)
        longest *= self.inference_wrapped_model.token_multiple
        tokens = self.pad_input_prompt_tokens([list(row) for row in prompts], len(prompts), longest)
        inputs = self.prep_inference_input(tokens.to(device.current_device()), active_requests)
        del inputs["tokens"]
        return inputs
