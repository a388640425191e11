"""An engine's answers in the form of `PUT /api`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.text_generation.communication import broadcast_object


class ModelInferenceWrapperServer(GPTInferenceWrapper):
    """A `GPTInferenceWrapper` with a static context of the configuration's size."""

    def __init__(
        self, model: nn.Module | Sequence[nn.Module], inference_wrapper_config: InferenceWrapperConfig
    ) -> None:
        super().__init__(model, inference_wrapper_config)


def run_mcore_engine(
    engine: StaticInferenceEngine | DynamicInferenceEngine,
    prompts: Sequence[str] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    logprobs: bool = True,
    tokens_to_generate: int = 0,
    top_n_logprobs: int = 0,
    echo: bool = False,
) -> dict[str, Any]:
    """{text, segments, tokens, logprobs, top_logprobs}: a row for each prompt, on all ranks; the last two if asked for.

    All ranks call it; what rank 0 says counts. Texts, tokens and `logprobs`, one for each token but the first, are
    those of the prompt and its continuation; `top_logprobs`, the likeliest tokens in the place of each, of the prompt
    too with `echo`.

    Raises:
        ValueError, MaxSequenceLengthOverflowError: there is no prompt, one is too long, or a value out of its range.
    """
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_tokens_to_generate=tokens_to_generate,
        return_log_probs=logprobs,
        return_segments=True,
        top_n_logprobs=top_n_logprobs,
        return_prompt_top_n_logprobs=echo and top_n_logprobs > 0,
    )
    texts, params = broadcast_object((list(prompts or ()), params))
    if not texts:
        raise ValueError("no prompt was given; at least one is needed")
    requests = engine.generate(texts, sampling_params=params)
    answer: dict[str, Any] = {
        "text": [prompt + request.generated_text for prompt, request in zip(texts, requests)],
        "segments": [request.segments for request in requests],
        "tokens": [[*request.prompt_tokens, *_listed(request.generated_tokens)] for request in requests],
    }
    if params.return_log_probs:
        known = [(_listed(request.prompt_log_probs), _listed(request.generated_log_probs)) for request in requests]
        answer["logprobs"] = [prompt + generated for prompt, generated in known]
    if params.top_n_logprobs:
        answer["top_logprobs"] = [
            [*(request.prompt_top_n_logprobs or ()), *(request.generated_top_n_logprobs or ())] for request in requests
        ]
    return answer


def _listed(values: Any) -> list[Any]:
    return [] if values is None else torch.as_tensor(values).tolist()
