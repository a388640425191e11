"""Continuous batching: texts join and leave between passes (Orca, OSDI 2022, section 3)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.core.inference.contexts import (
    ContextOverflowError,
    DynamicInferenceContext,
    EncoderDecoderContext,
    MaxSequenceLengthOverflowError,
)
from megatron.core.inference.engines.abstract_engine import AbstractEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest, FinishReason, Status
from megatron.core.inference.sampling import generator_of
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    Outcome,
    TextGenerationController,
)

Listener = Callable[[DynamicInferenceRequest], None]


class DynamicInferenceEngine(AbstractEngine):
    """Runs all requests that find room in the context, the others wait in the order of their arrival.

    All ranks of a model make the same calls in the same order. What a request gives does not depend on the others.

    Args:
        controller: draws tokens.
        context: the one that the controller's model runs with.
        termination_id: the token that ends a text.
        enable_cuda_graph: not built.
        random_seed: of requests without a seed of their own, together with their number.

    Raises:
        NotImplementedError: `enable_cuda_graph`.
        ValueError: the model runs with another context.
    """

    def __init__(
        self,
        controller: TextGenerationController,
        context: DynamicInferenceContext | EncoderDecoderContext,
        termination_id: int,
        enable_cuda_graph: bool = False,
        random_seed: int | None = None,
    ) -> None:
        if enable_cuda_graph:
            raise NotImplementedError("enable_cuda_graph is not built yet; leave it off")
        if controller.inference_wrapped_model.inference_context is not context:
            raise ValueError("the model of the controller runs with another context than the engine's")
        self.controller, self.context = controller, context
        self.termination_id = termination_id
        self.random_seed = 1234 if random_seed is None else random_seed
        self.listeners: list[Listener] = []
        """Called with each request whenever it has a new token, and when it is completed."""
        self.reset()

    def reset(self) -> None:
        """Without requests."""
        self.context.reset()
        self.requests: dict[int, DynamicInferenceRequest] = {}
        """Those that wait or run."""
        self.waiting: deque[int] = deque()
        for chunk in self.controller.inference_wrapped_model.chunks:
            chunk.eval()

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    # --- requests -----------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: int,
        prompt: str | Sequence[int] | Tensor,
        num_tokens_to_generate: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> DynamicInferenceRequest:
        """Put a prompt into the queue.

        Args:
            prompt: a text, or token numbers [n].
            num_tokens_to_generate: instead of the settings' number.
            sampling_params: of this request; without them those that `step` gets.

        Raises:
            ValueError: the prompt is empty, has tokens outside the vocabulary, or the number is in use.
            MaxSequenceLengthOverflowError: prompt and continuation are longer than any text may be.
        """
        if request_id in self.requests:
            raise ValueError(f"request {request_id} is not completed yet: give another number")
        tokens = self._tokens(prompt)
        if num_tokens_to_generate is None and sampling_params is not None:
            num_tokens_to_generate = sampling_params.num_tokens_to_generate
        self.check_prompt(tokens, num_tokens_to_generate or 0)
        seed = sampling_params.seed if sampling_params is not None else None
        request = DynamicInferenceRequest(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=tokens,
            sampling_params=sampling_params,
            arrival_time=time.time(),
            status=Status.WAITING_IN_QUEUE,
            generator=generator_of(self.random_seed + request_id if seed is None else seed),
        )
        request.generated_length = num_tokens_to_generate
        self.requests[request_id] = request
        self.waiting.append(request_id)
        return request

    def _tokens(self, prompt: str | Sequence[int] | Tensor) -> list[int]:
        if isinstance(prompt, str):
            return self.controller.tokenize_prompt(prompt)
        return [int(token) for token in prompt]

    def check_prompt(self, tokens: Sequence[int], num_tokens_to_generate: int) -> None:
        """Raises what `add_request` would; changes nothing."""
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        if not 0 <= min(tokens) <= max(tokens) < self.controller.vocab_size:
            raise ValueError(f"the prompt has token numbers outside the vocabulary of {self.controller.vocab_size}")
        if num_tokens_to_generate > self.context.room_for(len(tokens)):
            raise MaxSequenceLengthOverflowError(
                f"the prompt has {len(tokens)} tokens and {num_tokens_to_generate} more were asked for; a text "
                f"has at most {self.context.max_sequence_length}"
            )

    def cancel(self, request_id: int) -> DynamicInferenceRequest | None:
        """End a request with the tokens that it has; None if it is unknown or completed."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        if request_id in self.context.sequences:
            self.context.remove_request(request_id)
        else:
            self.waiting.remove(request_id)
        self._complete(request, FinishReason.CANCELLED)
        return request

    # --- passes -------------------------------------------------------------------------------------------

    def step(
        self, sampling_params: SamplingParams | None = None, *, verbose: bool = False
    ) -> tuple[list[DynamicInferenceRequest], float]:
        """(requests completed by one pass of the model, its seconds).

        Args:
            sampling_params: of requests that came without.
            verbose: unused; `listeners` see each token.
        """
        begin = time.perf_counter()
        finished: list[DynamicInferenceRequest] = []
        self._admit(sampling_params or SamplingParams())
        if not self.context.has_unfinished_requests():
            return finished, time.perf_counter() - begin
        self.context.initialize_attention_state()
        while self.context.preempted:
            self._wait_again(self.context.preempted.pop())
        outcomes = self.controller.run_step(self.context, self.requests)
        active, tokens = [], []
        for outcome in outcomes:
            request = self.requests[outcome.request_id]
            reason = self._take(request, outcome)
            if outcome.token is not None:
                active.append(reason is None)
                tokens.append(outcome.token)
            if reason is not None:
                self._complete(request, reason)
                finished.append(request)
            elif outcome.token is not None:
                self._tell(request)
        self.context.update_requests(torch.tensor(active, dtype=torch.bool), torch.tensor(tokens, dtype=torch.int64))
        return finished, time.perf_counter() - begin

    def _admit(self, default: SamplingParams) -> None:
        """Requests that wait into the context, as long as there is room."""
        while self.waiting:
            request = self.requests[self.waiting[0]]
            params = request.sampling_params = request.sampling_params or default
            if request.generated_length is None:
                room = self.context.room_for(len(request.prompt_tokens or ()))
                request.generated_length = min(params.num_tokens_to_generate, room)
            missing = request.generated_length - len(request.generated_tokens)
            wants_prompt = params.return_log_probs or params.return_prompt_top_n_logprobs
            try:
                self.context.add_request(
                    request.request_id,
                    request.tokens,
                    missing,
                    wants_all_logits=wants_prompt and request.prompt_log_probs is None,
                )
            except ContextOverflowError:
                return
            request.status = Status.ACTIVE_AND_GENERATING_TOKENS
            self.waiting.popleft()

    def _wait_again(self, request_id: int) -> None:
        """A request that lost its place in the context is the next to get one; its prompt's report begins anew."""
        request = self.requests[request_id]
        request.status = Status.WAITING_IN_QUEUE
        if not request.generated_tokens:
            request.prompt_log_probs = request.prompt_top_n_token_logprobs = None
        self.waiting.appendleft(request_id)

    def _take(self, request: DynamicInferenceRequest, outcome: Outcome) -> FinishReason | None:
        """Note what a pass gave; why the request ends, None if it does not."""
        params = request.sampling_params
        assert params is not None and request.generated_length is not None
        if outcome.prompt or (outcome.token is not None and request.prompt_log_probs is None):
            if params.return_log_probs:
                request.prompt_log_probs = (request.prompt_log_probs or []) + [row.log_prob for row in outcome.prompt]
            if params.return_prompt_top_n_logprobs:
                known = request.prompt_top_n_token_logprobs or []
                request.prompt_top_n_token_logprobs = known + [row.best for row in outcome.prompt]
        if outcome.token is None:
            return None
        if request.generated_length == 0:
            return FinishReason.LENGTH
        request.generated_tokens.append(outcome.token)
        assert outcome.generated is not None
        if params.return_log_probs:
            request.generated_log_probs = [*(request.generated_log_probs or ()), outcome.generated.log_prob]
        if params.top_n_logprobs:
            known = request.generated_top_n_token_logprobs or []
            request.generated_top_n_token_logprobs = [*known, outcome.generated.best]
        if outcome.token in params.stop_token_ids:
            return FinishReason.STOP
        if outcome.token == self.termination_id and not params.ignore_termination:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(request.generated_tokens) >= request.generated_length else None

    def _complete(self, request: DynamicInferenceRequest, reason: FinishReason) -> None:
        del self.requests[request.request_id]
        request.status, request.finish_reason = Status.COMPLETED, reason
        request.generated_length = len(request.generated_tokens)
        if self.controller.tokenizer is not None:
            self._detokenize(request)
        self._tell(request)

    def _detokenize(self, request: DynamicInferenceRequest) -> None:
        controller, params = self.controller, request.sampling_params
        request.generated_text = controller.tokenizer.detokenize(request.generated_tokens)
        if params is not None and params.return_segments:
            request.segments = controller.segments(request.tokens)
            request.generated_segments = request.segments[len(request.prompt_tokens or ()) :]

        def named(rows: list[list[tuple[int, float]]] | None) -> list[dict[str, float]] | None:
            if rows is None:
                return None
            return [{controller.tokenizer.detokenize([token]): value for token, value in row} for row in rows]

        request.prompt_top_n_logprobs = named(request.prompt_top_n_token_logprobs)
        request.generated_top_n_logprobs = named(request.generated_top_n_token_logprobs)

    def _tell(self, request: DynamicInferenceRequest) -> None:
        for listener in self.listeners:
            listener(request)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling_params: SamplingParams | None = None
    ) -> list[DynamicInferenceRequest]:
        """The requests of all prompts, completed, in their order.

        Raises:
            ValueError, MaxSequenceLengthOverflowError: as `add_request`, before any pass.
        """
        params = sampling_params or SamplingParams()
        first = max(self.requests, default=-1) + 1
        requests = []
        try:
            for number, prompt in enumerate(prompts, first):
                requests.append(self.add_request(number, prompt, sampling_params=params))
        except Exception:
            for request in requests:
                self.cancel(request.request_id)
            raise
        while any(request.request_id in self.requests for request in requests):
            self.step(params)
        return requests
