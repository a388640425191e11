"""One batch from its prompts to its end, all rows at the same position.

b rows, l tokens of the longest row with its continuation, s tokens of a pass, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.inference.communication_utils import decides, share_decision
from megatron.core.inference.log_probs import Told, rows_told, told
from megatron.core.inference.sampling import Draw, generator_of, sample
from megatron.core.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
        AbstractModelInferenceWrapper,
    )


@dataclass
class Row:
    """One text of the batch."""

    prompt: list[int]
    generator: torch.Generator
    generated: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    """Of each token but the first, as far as anything was asked."""
    is_done: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated


class StaticBatch:
    """Rows that go through the model together: first as far as the shortest prompt, then token by token.

    All share one set of settings. A row whose prompt is longer takes its next token from there. A row that has ended
    waits for the others.

    Args:
        termination_id: the token that ends a row; it is not counted as generated.
        seed: of the settings without one, together with the row's number.
        constants: what each pass of the model has besides its tokens.

    Raises:
        ValueError: there is no prompt, or the texts do not fit into the context.
    """

    def __init__(
        self,
        wrapper: AbstractModelInferenceWrapper,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        termination_id: int,
        seed: int,
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        self.constants = dict(constants or {})
        if not prompts or not all(prompts):
            raise ValueError("each prompt needs at least one token")
        self.wrapper, self.params, self.termination_id = wrapper, params, termination_id
        seeds = [(seed if params.seed is None else params.seed) + row for row in range(len(prompts))]
        self.rows = [Row(list(prompt), generator_of(number)) for prompt, number in zip(prompts, seeds)]
        self.length = max(len(prompt) for prompt in prompts) + params.num_tokens_to_generate
        context, multiple = wrapper.inference_context, wrapper.token_multiple
        rows_allowed = getattr(context, "max_batch_size", len(prompts))
        if self.length + multiple - 1 > context.max_sequence_length or len(prompts) > rows_allowed:
            raise ValueError(
                f"{len(prompts)} texts of up to {self.length} tokens with their continuations: the context has room "
                f"for {rows_allowed} of {context.max_sequence_length - multiple + 1} tokens"
            )
        self.wants_prompt = params.return_log_probs or params.return_prompt_top_n_logprobs

    def run(self, on_token: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
        """The rows, each with its continuation. `on_token` is called after each pass."""
        self.wrapper.prep_model_for_inference()
        start, stop = 0, min(len(row.prompt) for row in self.rows)
        while True:
            self._take(start, stop, self._pass(start, stop))
            on_token(self.rows)
            start, stop = stop, stop + 1
            if stop > self.length or all(row.is_done for row in self.rows):
                return self.rows

    def _pass(self, start: int, stop: int) -> Tensor:
        """[b * w, 2 + 2n] as of `rows_told`, of the w last positions from `start` to `stop` - 1."""
        multiple = self.wrapper.token_multiple
        begin = 0 if self.wrapper.takes_whole_rows else start
        width = -(-(stop - begin) // multiple) * multiple
        tokens = torch.full((len(self.rows), width), self.termination_id if self.termination_id >= 0 else 0)
        for number, row in enumerate(self.rows):
            part = (row.tokens + [int(tokens[number, 0])] * self.length)[begin:stop]
            tokens[number, : stop - begin] = torch.tensor(part)
        positions = torch.arange(begin, begin + width)
        positions[stop - begin :] = 0
        wanted = torch.zeros_like(tokens, dtype=torch.bool)
        wanted[:, start - begin if self.wants_prompt else stop - begin - 1 : stop - begin] = True
        where = device.current_device()
        inputs = {
            **self.constants,
            "tokens": tokens.to(where),
            "position_ids": positions.expand_as(tokens).to(where),
            "output_positions": wanted.to(where),
        }
        logits = self.wrapper.run_one_forward_step(inputs)
        self.wrapper.inference_context.increment_sequence_len_offset(stop - start)
        decision, num_best = None, self.params.top_n_logprobs
        if decides():
            assert logits is not None
            count = int(wanted[0].sum())
            targets = self._targets(stop, count, logits[0])
            decision = rows_told(targets, logits[0], num_best, self.params.return_log_probs)
        return share_decision(decision, [int(wanted.sum()), 2 + 2 * num_best])

    def _targets(self, stop: int, count: int, logits: Tensor) -> Tensor:
        """[b * count] int64: the tokens behind the last `count` positions before `stop`, known or drawn."""
        drawn = [number for number, row in enumerate(self.rows) if stop >= len(row.prompt)]
        last = logits.view(len(self.rows), count, -1)[drawn, -1]
        draws = [
            Draw(self.params, row.generator, row.tokens, len(row.generated))
            for row in (self.rows[number] for number in drawn)
        ]
        tokens = dict(zip(drawn, sample(last, draws).tolist())) if drawn else {}
        targets: list[int] = []
        for number, row in enumerate(self.rows):
            known = row.tokens[stop - count + 1 : stop] if number in tokens else row.tokens[stop - count + 1 : stop + 1]
            known += [0] * (count - len(known) - (number in tokens))  # a row that has ended
            targets += [*known, tokens[number]] if number in tokens else known
        return torch.tensor(targets, dtype=torch.int64)

    def _take(self, start: int, stop: int, decision: Tensor) -> None:
        params = self.params
        for row, rows in zip(self.rows, decision.split(len(decision) // len(self.rows))):
            if row.is_done:
                continue
            found = [told(one, params.top_n_logprobs, params.top_n_logprobs) for one in rows]
            if stop < len(row.prompt):
                row.told += found
                continue
            token = found[-1].token
            is_over = len(row.generated) >= params.num_tokens_to_generate
            if is_over or (token == self.termination_id and not params.ignore_termination):
                row.told += found[:-1]
                row.is_done = True
                continue
            row.told += found
            row.generated.append(token)
            row.is_done = len(row.generated) == params.num_tokens_to_generate or token in params.stop_token_ids
