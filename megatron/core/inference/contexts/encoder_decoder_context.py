"""Texts that a decoder writes after an encoder has read their prompts, each at a position of its own.

b texts of a pass, d rows of tokens (one, and what fills up), e tokens of the longest prompt, a heads and g query groups
of one tensor parallel rank, h head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron.core import device
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.inference.contexts.overflow import MaxSequenceLengthOverflowError, RequestOverflowError
from megatron.core.inference.contexts.row_memory import RowMemory, Rows, lengths_mask
from megatron.core.inference.contexts.step_plan import CachedSequence, Part


@dataclass
class DecodedSequence(CachedSequence):
    """A text; `tokens` are the decoder's, from its start token on."""

    encoder_tokens: list[int] = field(default_factory=list)


class DecoderPlan:
    """A pass over one token of each of some texts.

    Args:
        sequences: the texts.
        rows: their rows in the memory.
        encodes: they are new: the encoder reads their prompts first.
    """

    def __init__(self, sequences: Sequence[DecodedSequence], rows: Sequence[int], encodes: bool) -> None:
        where = device.current_device()
        self.sequences, self.encodes = sequences, encodes
        self.parts = [Part(sequence, sequence.num_cached, len(sequence.tokens)) for sequence in sequences]
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self.rows: Rows = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows, device=where)
        self.row_numbers = torch.tensor(rows, device=where)
        starts = [part.start for part in self.parts]
        self.positions = torch.tensor(starts, device=where)  # [b]
        self.longest = max(starts) + 1
        self.visible = lengths_mask(self.positions + 1, self.longest)
        lengths = [len(sequence.encoder_tokens) for sequence in sequences]
        self.longest_prompt = max(lengths)
        self.visible_of_prompt = lengths_mask(torch.tensor(lengths, device=where), self.longest_prompt)

    @property
    def drawn(self) -> list[Part]:
        """All of them."""
        return self.parts

    def wanted(self) -> list[list[int]]:
        """For each part its one position."""
        return [[row] for row in range(len(self.parts))]


class EncoderDecoderContext(BaseInferenceContext):
    """What a `DynamicInferenceEngine` asks a context for: prompts are the encoder's, which reads each once; the decoder
    keeps its keys and values, and those of the encoder's output.

    A pass is over all texts, or over those that are new, as long as there are any. Rows of the memory are as wide as
    the longest prompt, and the longest text that may be written, of those that run, and their number is doubled when
    there are too few, where there is room; nothing is held when none runs.

    Args:
        start_token: the decoder's first token.
        max_sequence_length: tokens of the encoder's longest prompt.
        max_requests: texts at once.
        max_decoded_length: tokens of the decoder's longest text, its start token included; None is the same.
        token_multiple: d.
        bytes_per_token: what the decoder's layers keep of a token of either kind, see `CacheSizes.per_encoded_token`.
        buffer_size_gb: GiB for all texts; None is no limit.
    """

    continues_prompts = False

    def __init__(
        self,
        start_token: int,
        max_sequence_length: int,
        max_requests: int,
        *,
        max_decoded_length: int | None = None,
        token_multiple: int = 1,
        bytes_per_token: int = 0,
        buffer_size_gb: float | None = None,
    ) -> None:
        super().__init__(materialize_only_last_token_logits=True)
        self.start_token, self.max_requests, self.token_multiple = start_token, max_requests, token_multiple
        self.max_sequence_length = max_sequence_length
        self.max_decoded_length = max_decoded_length or max_sequence_length
        self.max_tokens: int | None = None
        """Prompts' and written ones, filled up to the longest, that there is room for."""
        if buffer_size_gb is not None and bytes_per_token:
            self.max_tokens = int(buffer_size_gb * 2**30) // bytes_per_token
        self.written, self.encoded = RowMemory(), RowMemory()
        self.reset()

    def reset(self) -> None:
        """Without texts."""
        self.sequences: dict[int, DecodedSequence] = {}
        self.rows: list[int] = []
        """The text of each row of the memory."""
        self.preempted: list[int] = []
        """None ever is: a text has its room from the beginning."""
        self._plan: DecoderPlan | None = None
        self.written.clear()
        self.encoded.clear()

    def is_static_batching(self) -> bool:
        return False

    def room_for(self, num_prompt_tokens: int) -> int:
        """Tokens that the decoder may write; negative if the prompt is too long."""
        if -(-num_prompt_tokens // self.token_multiple) * self.token_multiple > self.max_sequence_length:
            return -1
        fits = self.max_decoded_length - 1  # the start token is none of them
        return fits if self.max_tokens is None else max(min(fits, self.max_tokens - num_prompt_tokens), -1)

    def chunk_counts(self) -> dict[str, float]:
        """There are no chunks."""
        return {}

    # --- texts ----------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: int,
        tokens: Tensor | list[int],
        num_tokens_to_generate: int | None = None,
        *,
        wants_all_logits: bool = False,
    ) -> None:
        """Take a prompt of the encoder: [n] tokens, for which the decoder writes at most `num_tokens_to_generate`.

        Args:
            wants_all_logits: no effect: a prompt has none here.

        Raises:
            MaxSequenceLengthOverflowError: it may never be that long.
            RequestOverflowError: there is no room now.
        """
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        room = self.room_for(len(ids))
        wanted = max(room, 0) if num_tokens_to_generate is None else num_tokens_to_generate
        if wanted > room or not ids:
            raise MaxSequenceLengthOverflowError(
                f"{len(ids)} tokens and {wanted} to write: a prompt has 1 to {self.max_sequence_length}, a text has at "
                f"most {self.max_decoded_length}"
                + ("" if self.max_tokens is None else f", both together at most {self.max_tokens} in this memory")
            )
        if len(self.sequences) == self.max_requests:
            raise RequestOverflowError(f"{self.max_requests} texts run already")
        sequence = DecodedSequence(request_id, [self.start_token], 1 + wanted, slot=0, encoder_tokens=ids)
        self._make_room(sequence)
        self.sequences[request_id] = sequence
        self.rows.append(request_id)

    def _make_room(self, new: DecodedSequence) -> None:
        """Widen the memory for one more text; it shrinks to what is needed where it would become too large.

        Raises:
            RequestOverflowError: all rows as wide as the widest are too much.
        """
        texts = [*self.sequences.values(), new]
        needed = len(texts), max(_width(text) for text in texts), max(len(text.encoder_tokens) for text in texts)
        held = max(self.written.num_rows, self.encoded.num_rows), self.written.length, self.encoded.length
        larger = tuple(map(max, needed, held))
        doubled = min(1 << (larger[0] - 1).bit_length(), self.max_requests)  # few of many arrivals copy what is held
        for rows, written, encoded in ((doubled, *larger[1:]), larger, needed):
            if self.max_tokens is None or rows * (written + encoded) <= self.max_tokens:
                self.written.resize(rows, written, len(self.rows))
                self.encoded.resize(rows, encoded, len(self.rows))
                return
        raise RequestOverflowError(f"{needed[0]} texts of up to {needed[1]} + {needed[2]} tokens do not fit")

    def remove_request(self, request_id: int) -> None:
        """Forget a text. The last row takes its place."""
        del self.sequences[request_id]
        row, last = self.rows.index(request_id), self.rows.pop()
        if last != request_id:
            self.rows[row] = last
            for memory in (self.written, self.encoded):
                memory.move(len(self.rows), row)
        if not self.rows:
            self.written.clear()
            self.encoded.clear()

    def has_unfinished_requests(self) -> bool:
        return bool(self.sequences)

    # --- a pass ---------------------------------------------------------------------------------------

    def initialize_attention_state(self) -> None:
        """The next pass is over the new texts, or over all if there are none."""
        texts = [self.sequences[number] for number in self.rows]
        new = [row for row, text in enumerate(texts) if not text.num_cached]
        rows = new or list(range(len(texts)))
        self._plan = DecoderPlan([texts[row] for row in rows], rows, encodes=bool(new))

    @property
    def plan(self) -> DecoderPlan:
        """Of the pass that runs."""
        assert self._plan is not None, "initialize_attention_state comes first"
        return self._plan

    @property
    def encodes(self) -> bool:
        """The encoder takes part in the pass that runs."""
        return self.plan.encodes

    def current_input_ids(self) -> Tensor:
        """[b, d] the decoder's token of each text, rows filled up on the right."""
        last = [[part.sequence.tokens[-1]] for part in self.plan.parts]
        return self._filled(torch.tensor(last, device=device.current_device()))

    def current_position_ids(self) -> Tensor:
        """[b, d] where they stand in their texts."""
        return self._filled(self.plan.positions[:, None])

    def output_positions(self) -> Tensor:
        """[b, d] bool: the tokens, not what fills up."""
        return self._filled(torch.ones_like(self.plan.positions, dtype=torch.bool)[:, None])

    def _filled(self, column: Tensor) -> Tensor:
        return pad(column, (0, self.token_multiple - 1))

    def update_requests(self, active_requests_mask: Tensor, new_tokens: Tensor) -> None:
        """After a pass: texts that are not active any more are forgotten, the others get their new token."""
        for part, is_active, token in zip(self.plan.parts, active_requests_mask.tolist(), new_tokens.tolist()):
            if is_active:
                part.sequence.num_cached = part.stop
                part.sequence.tokens.append(token)
            else:
                self.remove_request(part.sequence.request_id)
        self._plan = None

    # --- layers ---------------------------------------------------------------------------------------

    def relative_bias(self, table: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[b, a, 1, longest] what is added to the scores of self attention; -inf where there is no token.

        Args:
            table: (positions [b], length) -> [b, a, 1, length] bias of all tokens before that length.
        """
        return table(self.plan.positions, self.plan.longest).masked_fill(~self.plan.visible, -torch.inf)

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        softmax_scale: float,
        window_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """[d, b, a * h] of causal self attention; see `BaseInferenceContext.attend`."""
        if window_size is not None:
            raise NotImplementedError("window_size: the decoder of an encoder-decoder model sees all of its text")
        return self.attend_with_bias(layer_number, query, key, value, softmax_scale, self.plan.visible)

    def attend_with_bias(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        softmax_scale: float,
        attention_bias: Tensor,
    ) -> Tensor:
        """The same with what `relative_bias` gave."""
        assert value is not None
        plan = self.plan
        self.written.write(layer_number, plan.row_numbers, plan.positions, key[0], value[0])
        keys, values = self.written.read(layer_number, plan.rows, plan.longest)
        return self._found(query, keys, values, attention_bias, softmax_scale)

    def keep_encoded(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Keys and values [e, b, g, h] of the encoder's output, which may be filled up, for `attend_encoded`."""
        kept = slice(self.plan.longest_prompt)
        rows = (x[kept].permute(1, 2, 0, 3) for x in (key, value))
        self.encoded.write(layer_number, self.plan.rows, kept, *rows)

    def attend_encoded(self, layer_number: int, query: Tensor, softmax_scale: float) -> Tensor:
        """[d, b, a * h]: what queries [d, b, a, h] find in the encoder's output."""
        keys, values = self.encoded.read(layer_number, self.plan.rows, self.plan.longest_prompt)
        return self._found(query, keys, values, self.plan.visible_of_prompt, softmax_scale)

    def _found(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        mask = mask if mask.dtype is torch.bool else mask.to(query.dtype)
        one = query[0].unsqueeze(2)  # [b, a, 1, h]: the other rows fill up
        found = scaled_dot_product_attention(one, keys, values, attn_mask=mask, scale=scale)
        return pad(found.flatten(1)[None], (0, 0, 0, 0, 0, query.size(0) - 1))


def _width(text: DecodedSequence) -> int:
    """Tokens whose keys are kept: the last one that is written is never read."""
    return max(text.max_length - 1, 1)
