"""Text from a trained model under any tensor-, context- and pipeline-parallel layout. b prompts, s tokens, v words.

Models that can (`decoding.can_decode_from_states`) go on from what they have kept of a text. For the others every new
token costs one forward pass over the context. Prompts of different lengths share a batch there: each row is aligned
left, the padding on its right is invisible to it because attention is causal, and its next token is read at its own
last position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.device import current_device
from megatron.core.inference.communication_utils import share_decision
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.sampling import Draw, generator_of, sample
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from megatron.inference.decoding import StateDecoder, can_decode_from_states
from megatron.inference.forward_only import evaluating, run_batches
from megatron.inference.text_generation.communication import broadcast_from_last_to_first_pipeline_stage
from megatron.inference.text_generation.forward_step import ForwardStep

DEFAULT_SEED = 1234
"""Of settings without one."""

NUM_BEST = 5
"""Likeliest tokens that scoring tells of."""


def pad_right(windows: Sequence[Sequence[int]], multiple: int) -> Tensor:
    """[b, s] int64: rows aligned left, filled with 0; s is the longest row rounded up to a multiple."""
    longest = max(len(window) for window in windows)
    width = -(-longest // multiple) * multiple
    return torch.tensor([[*window, *[0] * (width - len(window))] for window in windows])


def length_multiple(model: list[nn.Module]) -> int:
    """What a sequence's length must be a multiple of, so that it divides over the ranks.

    Sequence parallelism cuts the sequence into equal parts, context parallelism into two for each rank.
    """
    config, cp_size = get_model_config(model[0]), parallel_state.get_context_parallel_world_size()
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return math.lcm(multiple * cp_size, 2 * cp_size) if cp_size > 1 else multiple


def last_logits(model: list[nn.Module], windows: Sequence[Sequence[int]], vocab_size: int) -> Tensor | None:
    """[b, vocab_size] logits of the token after each window, on all ranks of the last stage; None elsewhere.

    All ranks of the model take part. Gathers the logits of one position a row over the tensor-parallel group, and sums
    them over the context-parallel group, where one rank has them.
    """
    cp_group = parallel_state.get_context_parallel_group()
    tokens = pad_right(windows, length_multiple(model)).to(current_device())
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    ends = torch.tensor([len(window) - 1 for window in windows], device=tokens.device)
    own = get_batch_on_this_cp_rank({"tokens": tokens, "position_ids": positions}, cp_group)

    def pick_last(output: Tensor) -> Tensor:
        is_end = own["position_ids"] == ends[:, None]  # [b, s/cp]
        offsets = is_end.int().argmax(1)
        logits = output[torch.arange(len(windows), device=output.device), offsets]  # [b, v/tp]
        logits = gather_from_tensor_model_parallel_region(logits)[:, :vocab_size]
        if cp_group.size() == 1:
            return logits
        logits = torch.where(is_end.any(1, keepdim=True), logits, 0.0)
        return reduce_from_tensor_model_parallel_region(logits, cp_group)

    with torch.no_grad():
        collected = run_batches(
            model,
            [own],
            lambda chunk, batch: chunk(batch["tokens"], batch["position_ids"], None),
            lambda output, _: pick_last(output),
            seq_length=tokens.size(1),
            num_sequences=tokens.size(0),
        )
    return collected[0] if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None


def share_next_tokens(next_tokens: Tensor | None, num_rows: int) -> list[int]:
    """The sampled tokens on every rank of the model: one broadcast over its tensor x pipeline group.

    One rank of the last stage decides for all, so that no two ranks can ever disagree on a draw.
    """
    shared = share_decision(next_tokens, [num_rows])
    return shared.long().tolist()


def generate(
    model: list[nn.Module],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_context: int,
    end_of_document: int | None = None,
    is_finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, as token ids without the prompt; the same on every rank.

    A continuation that reaches `end_of_document` stops before it. Text longer than `max_context` is continued
    from its last `max_context` tokens. Row i draws from its own generator, seeded with the settings' seed + i, whatever
    else is in the batch.

    Args:
        model: the chunks of this rank, with or without their wrappers.
        vocab_size: tokens of the vocabulary without padding; a padding token is never chosen.
        max_context: tokens that the model can look at.
        is_finished: (continuation so far, not empty) -> whether it ends here; the same on every rank.

    Raises:
        ValueError: no prompt, an empty one, or a token outside the vocabulary.
    """
    check_prompts(prompts, vocab_size)
    texts = [list(prompt) for prompt in prompts]
    unfinished = list(range(len(texts)))
    seed = DEFAULT_SEED if params.seed is None else params.seed
    generators = [generator_of(seed + row) for row in unfinished]
    decoder = StateDecoder(model[0], vocab_size, max_context) if can_decode_from_states(model) else None
    with evaluating(model):
        for _ in range(params.num_tokens_to_generate):
            if not unfinished:
                break
            if decoder is not None and max(len(texts[row]) for row in unfinished) <= max_context:
                logits = decoder.next_logits(texts, unfinished)
            else:
                decoder = None  # from here on, the window moves
                logits = last_logits(model, [texts[row][-max_context:] for row in unfinished], vocab_size)
            draws = [
                Draw(params, generators[row], texts[row], len(texts[row]) - len(prompts[row])) for row in unfinished
            ]
            drawn = None if logits is None else sample(logits, draws)
            for row, token in zip(list(unfinished), share_next_tokens(drawn, len(unfinished))):
                if token == end_of_document:
                    unfinished.remove(row)
                    continue
                texts[row].append(token)
                if is_finished is not None and is_finished(texts[row][len(prompts[row]) :]):
                    unfinished.remove(row)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise ValueError("no prompt was given; at least one is needed")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; the model continues text, so give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {number} has token ids outside the vocabulary of {vocab_size}: {list(prompt)}")


def score_and_return_on_first_stage(
    model: nn.Module, tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, torch.return_types.topk] | None:
    """(tokens, lengths, log-probabilities [b, s - 1] fp32 of all tokens but the first, the likeliest ones [b, s, 5] at
    each position) on the first stage, None elsewhere.

    All ranks of the model call this. What lies behind a row's length is no more than what was given there.
    Communicates: a pass, and the scores from the last stage to the first.

    Args:
        tokens: [b, s] int64, rows filled up on the right.
        lengths: [b] tokens of each row.
    """
    num_rows, length = tokens.shape
    step = ForwardStep(model, StaticInferenceContext(num_rows, length + length_multiple([model])))
    with evaluating([model]):
        logits = step(tokens, torch.arange(length, device=tokens.device).expand_as(tokens))
    chosen = values = places = None
    count = min(NUM_BEST, step.wrapper.vocab_size)
    if logits is not None:
        log_probs = logits.float().log_softmax(-1)
        chosen = log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        values, places = log_probs.topk(count)
    send = broadcast_from_last_to_first_pipeline_stage
    chosen = send([num_rows, length - 1], torch.float32, chosen)
    values = send([num_rows, length, count], torch.float32, values)
    places = send([num_rows, length, count], torch.int64, places)
    if chosen is None or not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return None
    return tokens, lengths, chosen, torch.return_types.topk((values, places))
