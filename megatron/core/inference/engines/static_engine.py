"""One batch at a time, from its prompts to the end of its last text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.abstract_engine import AbstractEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.scheduler import Scheduler
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController


class StaticInferenceEngine(AbstractEngine):
    """The simple engine: requests in the order of their arrival, in batches of at most `max_batch_size`.

    All ranks of a model make the same calls in the same order. A batch has the settings of its first request.

    Args:
        text_generation_controller: draws tokens; its model runs with a static context.
        max_batch_size: None is as many as the context has rows for.
        random_seed: of settings without a seed.

    Raises:
        ValueError: the model's context is not a static one.
    """

    def __init__(
        self,
        text_generation_controller: TextGenerationController,
        max_batch_size: int | None = None,
        random_seed: int | None = None,
    ) -> None:
        context = text_generation_controller.inference_wrapped_model.inference_context
        if not isinstance(context, StaticInferenceContext):
            raise ValueError(f"a static engine needs a StaticInferenceContext, the model runs with a {type(context)}")
        self.controller = text_generation_controller
        self.random_seed = 1234 if random_seed is None else random_seed
        self.scheduler = Scheduler(max_batch_size or context.max_batch_size)

    def get_new_request_id(self) -> str:
        """A number that no request has."""
        return self.scheduler.get_new_request_id()

    def add_request(
        self,
        prompt: str | None = None,
        add_BOS: bool = False,
        encoder_prompt: str | None = None,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        inference_request: InferenceRequest | None = None,
        *,
        inference_parameters: SamplingParams | None = None,
    ) -> str:
        """The number of a new request; see `Scheduler.add_request`."""
        if inference_request is None:
            assert prompt is not None, "a request needs a prompt"
            tokens = self.controller.tokenize_prompt(prompt, add_BOS)
        else:
            tokens = inference_request.prompt_tokens or self.controller.tokenize_prompt(inference_request.prompt)
            inference_request.prompt_tokens = tokens
        return self.scheduler.add_request(
            prompt,
            tokens,
            encoder_prompt,
            sampling_params,
            streaming=streaming,
            inference_request=inference_request,
            inference_parameters=inference_parameters,
        )

    def get_stream_generator(self, request_id: str) -> AsyncGenerator[InferenceRequest, None] | None:
        """The request after each of its tokens; None if it was not added with `streaming`."""
        stream = self.scheduler.streams.get(request_id)
        return None if stream is None else stream.generator()

    def generate(
        self,
        prompts: list[str] | None = None,
        add_BOS: bool = False,
        encoder_prompts: list[str] | None = None,
        common_inference_params: SamplingParams | None = None,
        sampling_params: SamplingParams | None = None,
        inference_requests: list[InferenceRequest] | None = None,
    ) -> list[InferenceRequest]:
        """The requests, completed, in the order of the prompts.

        Args:
            common_inference_params: the former name of `sampling_params`.
            inference_requests: instead of prompts.
        """
        params = sampling_params or common_inference_params
        if inference_requests is not None:
            numbers = [self.add_request(inference_request=request) for request in inference_requests]
        else:
            encoder = encoder_prompts or [None] * len(prompts or ())  # type: ignore[list-item]
            numbers = [self.add_request(text, add_BOS, other, params) for text, other in zip(prompts or (), encoder)]
        self.run_engine()
        return [self.scheduler.completed_request_pool.pop(number) for number in numbers]

    def run_engine(self) -> None:
        """Batch after batch, until no request is pending."""
        while self.scheduler.have_requests_pending():
            active = self.scheduler.active_request_pool.copy()
            streams = {
                number: self.scheduler.streams.pop(number) for number in active if number in self.scheduler.streams
            }
            try:
                self.controller.generate_all_output_tokens_static_batch(active, streams, self.random_seed)
            except Exception as error:
                for number in active:
                    self.scheduler.abort_request(number)
                for stream in streams.values():
                    stream.finish(error)
                raise
            self.scheduler.update_requests_pools(active)

    async def run_engine_async(self) -> None:
        """The same in a thread of its own, so that streams are served meanwhile."""
        await asyncio.get_running_loop().run_in_executor(None, self.run_engine)
