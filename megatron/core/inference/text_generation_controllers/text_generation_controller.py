"""From texts to tokens and back, and from the logits of a pass to the next tokens.

b rows, n rows that a token is drawn for, w positions of a pass that something is wanted of, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.inference.async_stream import AsyncStream
from megatron.core.inference.communication_utils import decides, share_decision
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.contexts.encoder_decoder_context import EncoderDecoderContext
from megatron.core.inference.contexts.step_plan import Part
from megatron.core.inference.inference_request import DynamicInferenceRequest, InferenceRequest, Status
from megatron.core.inference.log_probs import Told, rows_told, told
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper,
)
from megatron.core.inference.sampling import Draw, sample
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.static_batch import Row, StaticBatch


@dataclass(frozen=True)
class Outcome:
    """What a pass gave for one text."""

    request_id: int
    token: int | None
    """The drawn token; None while the prompt is not through."""
    generated: Told | None
    prompt: list[Told]
    """Of prompt tokens: those behind the positions that the pass went over."""


class TextGenerationController:
    """Tokens for the requests of an engine. All ranks of a model call its methods with equal arguments.

    Args:
        inference_wrapped_model: the model, and the context that it runs with.
        tokenizer: with `tokenize`, `detokenize`, `eod` and, for `add_BOS`, `bos`.
        pp_group: pipeline group; kept for the public interface, the model knows its groups.
    """

    def __init__(
        self,
        inference_wrapped_model: AbstractModelInferenceWrapper,
        tokenizer: Any,
        pp_group: ProcessGroup | None = None,
    ) -> None:
        self.inference_wrapped_model = inference_wrapped_model
        self.tokenizer = tokenizer
        self.pp_group = pp_group

    @property
    def vocab_size(self) -> int:
        """Tokens that can be drawn."""
        return self.inference_wrapped_model.vocab_size

    # --- texts ------------------------------------------------------------------------------------------

    def tokenize_prompt(self, prompt: str, add_BOS: bool = False) -> list[int]:
        """Token numbers of a text; `add_BOS` puts the begin-of-text token first."""
        tokens = [int(token) for token in self.tokenizer.tokenize(prompt)]
        return [int(self.tokenizer.bos), *tokens] if add_BOS else tokens

    def detokenize_generations(
        self,
        tokens_gpu_tensor: Tensor,
        lengths_gpu_tensor: Tensor,
        detokenize_segments: bool,
        skip_special_tokens: bool = True,
    ) -> tuple[str | list[str], list[list[str]] | None]:
        """(text, segments): of tokens [l], or of rows [b, l] of which the first `lengths` tokens count.

        Args:
            detokenize_segments: give the text of each token too.
            skip_special_tokens: unused: tokenizers here leave special tokens as they are.
        """
        if tokens_gpu_tensor.dim() == 1:
            tokens_gpu_tensor, single = tokens_gpu_tensor[None], True
        else:
            single = False
        rows = [row[:length] for row, length in zip(tokens_gpu_tensor.tolist(), lengths_gpu_tensor.view(-1).tolist())]
        texts = [self.tokenizer.detokenize(row) for row in rows]
        segments = [self.segments(row) for row in rows] if detokenize_segments else None
        return (texts[0] if single else texts), segments

    def segments(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self.tokenizer.detokenize([token]) for token in tokens]

    def pad_input_prompt_tokens(
        self, batch_prompt_tokens_list: list[list[int]], padded_batch_size: int, padded_sequence_length: int
    ) -> Tensor:
        """[padded_batch_size, padded_sequence_length] int64: prompts filled up with the end-of-document token."""
        tokens = torch.full((padded_batch_size, padded_sequence_length), int(self.tokenizer.eod))
        for row, own in zip(tokens, batch_prompt_tokens_list):
            row[: len(own)] = torch.tensor(own)
        return tokens

    def prep_inference_input(
        self, prompts_tokens: Tensor, active_requests: OrderedDict[str, InferenceRequest]
    ) -> dict[str, Any]:
        """What the passes over a batch [b, l] of prompts are cut from."""
        return self.inference_wrapped_model.prep_inference_input(prompts_tokens)

    def constant_inputs(
        self, prompts: Sequence[Sequence[int]], active_requests: OrderedDict[str, InferenceRequest]
    ) -> dict[str, Any]:
        """What each pass over a batch has besides its tokens."""
        return {}

    # --- one batch at a time ------------------------------------------------------------------------------

    def generate_all_output_tokens_static_batch(
        self,
        active_requests: OrderedDict[str, InferenceRequest],
        active_streams: Mapping[str, AsyncStream] | None = None,
        seed: int = 1234,
    ) -> OrderedDict[str, InferenceRequest]:
        """The requests, completed: one batch under the settings of the first.

        Args:
            active_streams: get each request whenever it has a new token.
            seed: of settings without one.
        """
        requests = list(active_requests.values())
        params = requests[0].sampling_params or SamplingParams()
        prompts = [request.prompt_tokens or self.tokenize_prompt(request.prompt) for request in requests]
        constants = self.constant_inputs(prompts, active_requests)
        batch = StaticBatch(self.inference_wrapped_model, prompts, params, int(self.tokenizer.eod), seed, constants)
        streams = active_streams or {}

        def report(rows: list[Row]) -> None:
            for request, row in zip(requests, rows):
                if request.request_id in streams and row.generated:
                    self._describe(request, row, params)
                    streams[request.request_id].put(dataclasses.replace(request))

        for request in requests:
            request.status = Status.ACTIVE_AND_GENERATING_TOKENS
        for request, row in zip(requests, batch.run(report)):
            self._describe(request, row, params)
            request.status = Status.COMPLETED
        for stream in streams.values():
            stream.finish()
        return active_requests

    def _describe(self, request: InferenceRequest, row: Row, params: SamplingParams) -> None:
        """Write into the request what became of its row."""
        first = len(row.prompt) - 1
        request.prompt_tokens = row.prompt
        request.generated_tokens = torch.tensor(row.generated, dtype=torch.int64)
        request.generated_length = len(row.generated)
        request.generated_sequence_lengths = [len(row.generated)]
        request.generated_text = self.tokenizer.detokenize(row.generated)
        if params.return_segments:
            request.segments = self.segments(row.tokens)
            request.generated_segments = request.segments[len(row.prompt) :]
        if params.return_log_probs:
            values = torch.tensor([one.log_prob for one in row.told])
            request.prompt_log_probs, request.generated_log_probs = values[:first], values[first:]
        if params.top_n_logprobs:
            begin = first if params.return_log_probs or params.return_prompt_top_n_logprobs else -len(row.generated)
            named = [{self.tokenizer.detokenize([token]): value for token, value in one.best} for one in row.told]
            request.generated_top_n_logprobs = named[begin:] if row.generated else []
            if params.return_prompt_top_n_logprobs:
                request.prompt_top_n_logprobs = named[:first]

    def update_generation_status(
        self,
        updated_prompts_tokens: Tensor,
        generation_started: Tensor,
        current_context_end_position: int,
        is_generation_done_tensor: Tensor,
        generated_sequence_lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(which rows [b] have ended, how many tokens [b] each has written): after the token at a position is known.

        A row ends at the end-of-document token, which is not counted; one in its prompt does not end it.

        Args:
            updated_prompts_tokens: [b, l] prompts and what was written behind them so far.
            generation_started: [b] bool, rows whose prompts end before the position.
            current_context_end_position: the position.
            is_generation_done_tensor: [b] bool, rows that had ended before.
            generated_sequence_lengths: [b] int, tokens that each had written before.
        """
        tokens = updated_prompts_tokens[:, current_context_end_position]
        done = is_generation_done_tensor.bool() | (generation_started & (tokens == int(self.tokenizer.eod)))
        return done, generated_sequence_lengths + (generation_started & ~done)

    def stream_tokens(
        self,
        sampling_params: SamplingParams,
        request_ids: Sequence[str],
        requests: Sequence[InferenceRequest],
        streams: Sequence[AsyncStream | None],
        generation_started: Sequence[bool],
        is_generation_done: Sequence[bool],
        tokens: Tensor,
        prompt_lengths: Sequence[int],
        generated_lengths: Sequence[int],
        output_log_probs: Tensor | None = None,
    ) -> None:
        """Put each request that has begun to write, as it is now, into its stream; end the streams of those that have
        ended. The requests themselves are not changed.

        Args:
            request_ids: unused, requests know theirs.
            streams: None for a request that nobody listens to.
            tokens: [b, l] prompts, each followed by what was written.
            prompt_lengths, generated_lengths: tokens of each.
            output_log_probs: [b, l - 1] of all tokens but the first of a row.
        """
        for row, (request, stream) in enumerate(zip(requests, streams)):
            if stream is None or stream.finished or not generation_started[row]:
                continue
            begin, end = prompt_lengths[row], prompt_lengths[row] + generated_lengths[row]
            written = tokens[row, begin:end]
            now = dataclasses.replace(
                request,
                status=Status.COMPLETED if is_generation_done[row] else Status.ACTIVE_AND_GENERATING_TOKENS,
                generated_tokens=written.clone(),
                generated_length=generated_lengths[row],
                generated_text=self.tokenizer.detokenize(written.tolist()),
            )
            if sampling_params.return_segments:
                now.segments = self.segments(tokens[row, :end].tolist())
                now.generated_segments = now.segments[begin:]
            if sampling_params.return_log_probs and output_log_probs is not None:
                values = output_log_probs[row, : end - 1].cpu()
                now.prompt_log_probs, now.generated_log_probs = values[: begin - 1], values[begin - 1 :]
            stream.put(now)
            if is_generation_done[row]:
                stream.finish()

    # --- drawing ----------------------------------------------------------------------------------------

    def sample_from_logits(
        self,
        last_token_logits: Tensor,
        sampling_params: SamplingParams | None = None,
        vocab_size: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[b] int64 drawn from logits [b, v].

        Args:
            vocab_size: no token from this number on is drawn.
            generators: one a row; without them rows draw from torch's default stream.
        """
        params = sampling_params or SamplingParams()
        streams = generators or [torch.default_generator] * len(last_token_logits)
        draws = [Draw(params, stream) for stream in streams]
        return sample(last_token_logits[:, : vocab_size or self.vocab_size], draws)

    def run_step(
        self,
        context: DynamicInferenceContext | EncoderDecoderContext,
        requests: Mapping[int, DynamicInferenceRequest],
    ) -> list[Outcome]:
        """What the pass that `context` has planned gives for each of its texts; the same on all ranks."""
        plan = context.plan
        logits = self.inference_wrapped_model.run_one_forward_step(self.inference_wrapped_model.inputs_of(context))
        params = [_params(requests[part.sequence.request_id]) for part in plan.parts]
        wanted = [len(places) for places in plan.wanted()]
        num_best = max(param.top_n_logprobs for param in params)
        wants_log_probs = any(param.return_log_probs for param in params)
        decision = None
        if decides():
            assert logits is not None
            rows = logits[0]
            tokens = self._tokens(plan.parts, wanted, rows, requests)
            decision = rows_told(tokens, rows, num_best, wants_log_probs)
        decision = share_decision(decision, [sum(wanted), 2 + 2 * num_best])
        outcomes = []
        for part, rows, param in zip(plan.parts, decision.split(wanted), params):
            outcomes.append(_outcome(part, [told(row, num_best, param.top_n_logprobs) for row in rows]))
        return outcomes

    def _tokens(
        self,
        parts: Sequence[Part],
        wanted: Sequence[int],
        logits: Tensor,
        requests: Mapping[int, DynamicInferenceRequest],
    ) -> Tensor:
        """[w] int64: for each wanted position the token after it, the prompt's or a drawn one."""
        tokens: list[int] = []
        draws, places, place = [], [], 0
        for part, count in zip(parts, wanted):
            sequence = part.sequence
            if sequence.wants_all_logits:
                tokens += sequence.tokens[part.start + 1 : part.stop + 1]
            if part.is_drawn:
                request = requests[sequence.request_id]
                assert request.generator is not None
                draws.append(Draw(_params(request), request.generator, sequence.tokens, len(request.generated_tokens)))
                places.append(place + count - 1)
                tokens.append(0)
            place += count
        result = torch.tensor(tokens, dtype=torch.int64)
        if draws:
            whole = len(places) == len(logits)  # no copy of all logits then
            result[places] = sample(logits if whole else logits[places], draws)
        return result

    def generate_output_tokens_dynamic_batch(
        self, sampling_params: SamplingParams, termination_id: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(requests that a token was drawn for, those of them that ended, the tokens): one pass of the context over the
        texts that were added to it, all with the same settings; None if there are none.
        """
        context = self.inference_wrapped_model.inference_context
        assert isinstance(context, DynamicInferenceContext)
        if not context.has_unfinished_requests():
            return None
        context.initialize_attention_state()
        requests = {
            number: DynamicInferenceRequest(
                request_id=number, sampling_params=sampling_params, generator=torch.default_generator
            )
            for number in context.sequences
        }
        drawn = [outcome for outcome in self.run_step(context, requests) if outcome.token is not None]
        ids = torch.tensor([outcome.request_id for outcome in drawn], dtype=torch.int64)
        tokens = torch.tensor([outcome.token for outcome in drawn], dtype=torch.int64)
        lengths = [(len(part.sequence.tokens), part.sequence.max_length) for part in context.plan.drawn]
        ended = torch.tensor([length + 1 >= most for length, most in lengths], dtype=torch.bool)
        ended |= tokens == termination_id
        context.update_requests(~ended, tokens)
        return ids, ids[ended], tokens.to(device.current_device())


def _params(request: DynamicInferenceRequest) -> SamplingParams:
    assert request.sampling_params is not None
    return request.sampling_params


def _outcome(part: Part, rows: list[Told]) -> Outcome:
    """Of the rows of a part, in the order of its positions: the last is of the drawn token, if there is one."""
    if not part.is_drawn:
        return Outcome(part.sequence.request_id, None, None, rows)
    return Outcome(part.sequence.request_id, rows[-1].token, rows[-1], rows[:-1])
