"""Texts from a model in one call that all ranks make, where the first has the prompts. v vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.device import current_device
from megatron.core.inference.communication_utils import decides, share_decision
from megatron.core.inference.contexts import BaseInferenceContext, StaticInferenceContext
from megatron.core.inference.log_probs import rows_told, told
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.static_batch import Row, StaticBatch
from megatron.inference.beam_search import Hypothesis, Tokens, beam_search
from megatron.inference.forward_only import evaluating
from megatron.inference.text_generation.communication import broadcast_object
from megatron.inference.text_generation.forward_step import ForwardStep
from megatron.inference.text_generation.generation import length_multiple
from megatron.inference.text_generation.tokenization import detokenize_generations
from megatron.training import get_tokenizer

Texts = tuple[
    list[str],
    list[list[str]] | None,
    list[list[float]] | None,
    list[list[int]],
    list[list[dict[str, float]]] | None,
]
"""(texts with their prompts, the text of each token, log-probabilities of all tokens but the first, tokens, the
likeliest tokens in the place of each but the first); None where it was not asked for."""

MakeStep = Callable[[nn.Module, BaseInferenceContext], ForwardStep]


@dataclass(frozen=True)
class _Generation:
    """A call of `generate_and_post_process`, as the first rank makes it."""

    prompts: list[str]
    params: SamplingParams
    add_bos: bool
    line_ends: list[str]
    """Texts at which a continuation ends."""
    with_segments: bool


def generate_and_post_process(
    model: nn.Module,
    inference_context: BaseInferenceContext,
    forward_step: MakeStep = ForwardStep,
    prompts: Sequence[str] | None = None,
    tokens_to_generate: int = 0,
    return_output_log_probs: bool = False,
    top_k_sampling: int = 0,
    top_p_sampling: float = 0.0,
    top_p_decay: float = 0.0,
    top_p_bound: float = 0.0,
    temperature: float = 1.0,
    add_BOS: bool = False,
    use_eod_token_for_early_termination: bool = True,
    stop_on_double_eol: bool = False,
    stop_on_eol: bool = False,
    prevent_newline_after_colon: bool = False,
    random_seed: int = -1,
    detokenize_segments: bool = True,
    data_parallel: bool = False,
    return_topk_logprobs: int = 0,
) -> Texts | None:
    """`Texts` on the first stage, None elsewhere. All ranks call it; what the first one says counts, others need not
    repeat it.

    Args:
        inference_context: a static one with room for the longest text.
        forward_step: makes what runs the model, see `ForwardStep`.
        prompts: a row each; their texts end at the end-of-document token or after `tokens_to_generate`. 0 scores them.
        stop_on_double_eol, stop_on_eol: a text ends at an empty line, at the end of a line.
        random_seed: below 0 it is drawn from torch's stream. Row i draws by the seed + i.
        data_parallel: each copy of the model has prompts of its own, on its first rank.

    Raises:
        ValueError: there is no prompt, a value is out of its range, or texts are longer than the context.
    """
    if top_k_sampling > 0 and top_p_sampling > 0:
        raise ValueError(f"top_k_sampling ({top_k_sampling}) and top_p_sampling ({top_p_sampling}) exclude each other")
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k_sampling,
        top_p=top_p_sampling,
        top_p_decay=top_p_decay,
        top_p_bound=top_p_bound,
        num_tokens_to_generate=tokens_to_generate,
        return_log_probs=return_output_log_probs or return_topk_logprobs > 0,
        top_n_logprobs=return_topk_logprobs,
        return_prompt_top_n_logprobs=return_topk_logprobs > 0,
        seed=random_seed if random_seed >= 0 else int(torch.randint(2**31, ())),
        forbidden_pairs=_newline_after_colon() if prevent_newline_after_colon else (),
        ignore_termination=not use_eod_token_for_early_termination,
    )
    ends = ["\n\n"] * stop_on_double_eol + ["\n"] * stop_on_eol
    own = _Generation(list(prompts or ()), params, add_BOS, ends, detokenize_segments)
    call: _Generation = broadcast_object(own, data_parallel=data_parallel)
    rows = _continued(call, forward_step(model, inference_context))
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return None
    tokens, texts, segments = _described([row.tokens for row in rows], call.with_segments)
    params, tokenizer = call.params, get_tokenizer()
    log_probs = [[one.log_prob for one in row.told] for row in rows] if params.return_log_probs else None
    best = None
    if params.top_n_logprobs:
        best = [[{tokenizer.detokenize([t]): value for t, value in one.best} for one in row.told] for row in rows]
    return texts, segments, log_probs, tokens, best


def _continued(call: _Generation, step: ForwardStep) -> list[Row]:
    tokenizer = get_tokenizer()
    start = [int(tokenizer.bos)] if call.add_bos else []
    prompts = [[*start, *map(int, tokenizer.tokenize(prompt))] for prompt in call.prompts]
    assert call.params.seed is not None
    batch = StaticBatch(step.wrapper, prompts, call.params, int(tokenizer.eod), call.params.seed)

    def stop_at_line_ends(rows: list[Row]) -> None:
        for row in rows:
            text = tokenizer.detokenize(row.generated) if call.line_ends else ""
            row.is_done |= any(end in text for end in call.line_ends)

    return batch.run(stop_at_line_ends)


def _newline_after_colon() -> tuple[tuple[int, int], ...]:
    """The last token of a colon, and that of a newline: a tokenizer may put others before it."""
    tokenizer = get_tokenizer()
    return ((int(tokenizer.tokenize(":")[-1]), int(tokenizer.tokenize("\n")[-1])),)


def _described(rows: list[list[int]], with_segments: bool) -> tuple[list[list[int]], list[str], list[list[str]] | None]:
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    tokens, texts, *segments = detokenize_generations(padded, lengths, with_segments)
    return tokens, texts, segments[0] if segments else None


# --- beams ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """A call of `beam_search_and_post_process`, as the first rank makes it."""

    prompts: list[str]
    tokens_to_generate: int
    beam_size: int
    add_bos: bool
    stop_token: int
    num_return_gen: int
    length_penalty: float
    forbidden_pairs: tuple[tuple[int, int], ...]
    with_segments: bool


def beam_search_and_post_process(
    model: nn.Module,
    forward_step: MakeStep = ForwardStep,
    prompts: Sequence[str] | None = None,
    tokens_to_generate: int = 0,
    beam_size: int = 0,
    add_BOS: bool = False,
    stop_token: int = 50256,
    num_return_gen: int = 1,
    length_penalty: float = 1,
    prevent_newline_after_colon: bool = False,
    detokenize_segments: bool = True,
) -> tuple[list[str], list[list[str]] | None, list[float]] | None:
    """(texts with the prompt, the text of each token, scores) of the best `num_return_gen` beams, best first, on the
    first stage; None elsewhere. All ranks call it; what rank 0 says counts.

    Raises:
        ValueError: there is not exactly one prompt, or no beam.
    """
    pairs = _newline_after_colon() if prevent_newline_after_colon else ()
    sizes = tokens_to_generate, beam_size, add_BOS, stop_token, num_return_gen, length_penalty
    call: _Search = broadcast_object(_Search(list(prompts or ()), *sizes, pairs, detokenize_segments))
    if len(call.prompts) != 1 or call.beam_size < 1:
        raise ValueError(f"beams are of one prompt, got {len(call.prompts)}; beam_size is {call.beam_size}")
    tokenizer = get_tokenizer()
    start = [int(tokenizer.bos)] if call.add_bos else []
    prompt = [*start, *map(int, tokenizer.tokenize(call.prompts[0]))]
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    found = _best_beams(model, forward_step, prompt, call)
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return None
    _, texts, segments = _described([[*prompt, *one.tokens] for one in found], call.with_segments)
    return texts, segments, [one.score for one in found]


def _best_beams(model: nn.Module, forward_step: MakeStep, prompt: list[int], call: _Search) -> list[Hypothesis]:
    longest = len(prompt) + call.tokens_to_generate
    context = StaticInferenceContext(call.beam_size, longest + length_multiple([model]))
    beams = _Beams(forward_step(model, context), context, prompt, call.forbidden_pairs)
    search = beam_search(beams.extend, call.beam_size, call.tokens_to_generate, call.stop_token, call.length_penalty)
    with evaluating([model]):
        return _completed(search)[: call.num_return_gen]


class _Beams:
    """Continuations whose keys and values are kept: each step costs one token of each. All ranks step alike."""

    def __init__(
        self,
        step: ForwardStep,
        context: StaticInferenceContext,
        prompt: list[int],
        forbidden_pairs: tuple[tuple[int, int], ...],
    ) -> None:
        self.step, self.context, self.prompt, self.forbidden = step, context, prompt, set(forbidden_pairs)
        self.rows: dict[Tokens, int] = {}
        """Of the last step's continuations."""

    async def extend(self, continuations: Sequence[Tokens], count: int) -> list[list[tuple[int, float]]]:
        """As `beam_search.Extend`: the first call is about the prompt, each later one about tokens behind those of the
        one before."""
        begin = self.context.sequence_len_offset
        if begin:
            self.context.swap_key_value_dict([self.rows[tokens[:-1]] for tokens in continuations])
        tails = [list(tokens[-1:]) if begin else self.prompt for tokens in continuations]
        self.rows = {tokens: row for row, tokens in enumerate(continuations)}
        tokens = torch.tensor(tails, device=current_device())
        positions = torch.arange(begin, begin + tokens.size(1), device=tokens.device).expand_as(tokens)
        logits = self.step(tokens, positions)
        decision, wanted = None, count + len(self.forbidden)
        if decides():
            assert logits is not None
            decision = rows_told(tokens[:, -1].cpu(), logits[:, -1], wanted, False)
        decision = share_decision(decision, [len(tails), 2 + 2 * wanted])
        likeliest = [told(row, wanted, wanted).best for row in decision]
        return [[one for one in row if (tail[-1], one[0]) not in self.forbidden] for tail, row in zip(tails, likeliest)]


def _completed(work: Coroutine[Any, Any, list[Hypothesis]]) -> list[Hypothesis]:
    """What a coroutine gives that waits for nothing; an event loop may run already."""
    try:
        work.send(None)
    except StopIteration as end:
        found: list[Hypothesis] = end.value
        return found
    raise RuntimeError("the search waits for something")
