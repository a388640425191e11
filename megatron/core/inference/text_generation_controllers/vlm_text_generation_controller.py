"""Requests that have images besides their words. b rows, s tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.inference.inference_request import InferenceRequest, VLMInferenceRequest
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController


class VLMTextGenerationController(TextGenerationController):
    """The controller of a `VLMInferenceWrapper`; requests are `VLMInferenceRequest`s."""

    def prep_inference_input(
        self, prompts_tokens: Tensor, active_requests: OrderedDict[str, InferenceRequest]
    ) -> dict[str, Any]:
        """As of the wrapper, with the images of all requests in their order.

        Raises:
            ValueError: a request has none, or sizes that differ from another's.
        """
        requests = [request for request in active_requests.values() if isinstance(request, VLMInferenceRequest)]
        sizes = {(request.num_img_embeddings_per_tile, request.decoder_seq_length) for request in requests}
        if len(requests) != len(active_requests) or len(sizes) != 1:
            raise ValueError(
                "each request must be a VLMInferenceRequest, all with one num_img_embeddings_per_tile and one "
                f"decoder_seq_length, got {sorted(sizes)}"
            )
        where, ((per_tile, longest),) = device.current_device(), sizes
        return self.inference_wrapped_model.prep_inference_input(  # type: ignore[call-arg]
            prompts_tokens,
            num_img_embeddings_per_tile=per_tile,
            images=torch.cat([request.imgs for request in requests]).to(where),
            num_tiles=torch.cat([request.num_tiles for request in requests]).to(where),
            decoder_seq_length=longest,
        )

    def constant_inputs(
        self, prompts: Sequence[Sequence[int]], active_requests: OrderedDict[str, InferenceRequest]
    ) -> dict[str, Any]:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError(f"prompts with images must be of equal length, got {[len(prompt) for prompt in prompts]}")
        tokens = self.pad_input_prompt_tokens([list(row) for row in prompts], len(prompts), len(prompts[0]))
        inputs = self.prep_inference_input(tokens.to(device.current_device()), active_requests)
        return {name: inputs[name] for name in ("images", "num_tiles", "ends")}
