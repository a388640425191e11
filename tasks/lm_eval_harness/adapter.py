"""A GPT as a model of lm-eval. Importing this needs the package lm-eval.

Every rank runs the whole harness on the same requests and gets the same answers: the harness sees one process, and the
requests are spread over the data parallel ranks underneath.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.collective import gather_entries
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.scoring import ScoredText, score
from megatron.inference.text_generation import generate

MOST_NEW_TOKENS = 256
"""Where a task does not say."""


class GPTOfHarness(TemplateLM):
    """Answers the three kinds of requests of lm-eval.

    Args:
        model: the chunks of this rank.
        length: tokens that the model reads at once.
        batch_size: requests that a data parallel rank runs at once.
    """

    def __init__(self, model: list[nn.Module], tokenizer: Any, *, length: int, batch_size: int) -> None:
        super().__init__()
        self.model, self.own_tokenizer = model, tokenizer
        self.length, self.batch_size = length, batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents; it stands before texts that nothing stands before."""
        return self.own_tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """For the harness' caches."""
        return type(self.own_tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, without special ones."""
        return list(self.own_tokenizer.tokenize(string))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [last_of(context, continuation, self.length) for _, context, continuation in requests]
        found = [(one.log_likelihood, one.is_greedy) for one in self._score(texts)]
        for (words, _, _), answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", words, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, all of its tokens, after the token that ends documents."""
        pieces = [rolling(self.tok_encode(request.args[0]), self.eot_token_id, self.length) for request in requests]
        scores = iter(self._score([text for of_request in pieces for text in of_request]))
        found = [sum(next(scores).log_likelihood for _ in of_request) for of_request in pieces]
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def _score(self, texts: Sequence[ScoredText]) -> list[Any]:
        return score(self.model, texts, batch_size=self.batch_size)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first of the request's stops."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=False)
        own = range(len(requests))[group.rank() :: group.size()]
        said: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for place in own:
            by_settings.setdefault(repr(requests[place].args[1]), []).append(place)
        for places in by_settings.values():
            for begin in range(0, len(places), self.batch_size):
                batch = places[begin : begin + self.batch_size]
                contexts = [requests[place].args[0] for place in batch]
                said.update(zip(batch, self._continue(contexts, dict(requests[batch[0]].args[1]))))
        found = gather_entries(said, group)
        answers = [found[place] for place in range(len(requests))]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _continue(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        stops = settings.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        most = int(settings.pop("max_gen_toks", MOST_NEW_TOKENS))
        prompts = [(self.tok_encode(text) or [self.eot_token_id])[-max(1, self.length - most) :] for text in contexts]
        tokens = generate(
            self.model,
            prompts,
            sampling(settings, most),
            vocab_size=self.own_tokenizer.vocab_size,
            max_context=self.length,
            end_of_document=self.eot_token_id,
            is_finished=lambda new: any(stop in self.own_tokenizer.detokenize(new) for stop in stops),
        )
        return [until(self.own_tokenizer.detokenize(new) if new else "", stops) for new in tokens]


def last_of(context: list[int], continuation: list[int], length: int) -> ScoredText:
    """The continuation after as much of the context as a window of `length` tokens has room for.

    Raises:
        ValueError: there is no room for the continuation, or nothing in it.
    """
    if not 0 < len(continuation) <= length:
        raise ValueError(f"a continuation of {len(continuation)} tokens, where --seq-length is {length}")
    tokens = [*context, *continuation][-(length + 1) :]
    return ScoredText(tokens, max(1, len(tokens) - len(continuation)))


def rolling(tokens: list[int], prefix: int, length: int) -> list[ScoredText]:
    """Each token once, in windows of `length` predictions; the last window begins early enough to be full.

    >>> [(text.tokens, text.first) for text in rolling([1, 2, 3, 4, 5], prefix=0, length=3)]
    [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2)]
    """
    texts = [ScoredText([prefix, *tokens[:length]], 1)] if tokens else []
    for begin in range(length, len(tokens), length):
        end = min(begin + length, len(tokens))
        texts.append(ScoredText(tokens[end - length - 1 : end], length + 1 - (end - begin)))
    return texts


def sampling(settings: dict[str, Any], most: int) -> SamplingParams:
    """Greedy, unless the task asks for a draw."""
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    if not settings.pop("do_sample", temperature > 0):
        temperature = 0.0
    chosen = SamplingParams(
        temperature=temperature,
        top_k=int(settings.pop("top_k", 0)),
        top_p=float(settings.pop("top_p", 0.0)),
        num_tokens_to_generate=most,
    )
    if settings:
        raise ValueError(f"generation settings that are not known here: {', '.join(sorted(settings))}")
    return chosen


def until(text: str, stops: list[str]) -> str:
    """`text` up to the first stop."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
