"""Texts that a decoder writes after an encoder has read their prompts, each at a position of its own.

b texts of a pass, d tokens of the longest in its decoder, e in the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.inference.contexts.overflow import MaxSequenceLengthOverflowError, RequestOverflowError
from megatron.core.inference.contexts.step_plan import CachedSequence, Part


@dataclass
class DecodedSequence(CachedSequence):
    """A text; `tokens` are the decoder's, from its start token on."""

    encoder_tokens: list[int] = field(default_factory=list)
    encoder_output: Tensor | None = None
    """[e, h] of its own tokens, where it is kept."""


@dataclass(frozen=True)
class DecoderPlan:
    """A pass over the whole of all texts."""

    parts: list[Part]

    @property
    def drawn(self) -> list[Part]:
        """All of them."""
        return self.parts

    def wanted(self) -> list[list[int]]:
        """For each part its last position."""
        return [[part.stop - 1] for part in self.parts]


class EncoderDecoderContext(BaseInferenceContext):
    """What a `DynamicInferenceEngine` asks a context for, without memory of keys and values: prompts are the encoder's,
    and each pass is over all that the decoder has written of all texts.

    Args:
        start_token: the decoder's first token.
        max_sequence_length: tokens of the encoder's longest prompt.
        max_requests: texts at once.
        max_decoded_length: tokens of the decoder's longest text, its start token included; None is the same.
        token_multiple: d is a multiple of this.
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
    ) -> None:
        super().__init__(materialize_only_last_token_logits=True)
        self.start_token, self.max_requests, self.token_multiple = start_token, max_requests, token_multiple
        self.max_sequence_length = max_sequence_length
        self.max_decoded_length = max_decoded_length or max_sequence_length
        self.reset()

    def reset(self) -> None:
        """Without texts."""
        self.sequences: dict[int, DecodedSequence] = {}
        self.preempted: list[int] = []
        """None ever is: there is nothing that they could lack."""
        self._plan: DecoderPlan | None = None

    def is_static_batching(self) -> bool:
        return False

    def room_for(self, num_prompt_tokens: int) -> int:
        """Tokens that the decoder may write; negative if the prompt is too long."""
        if num_prompt_tokens > self.max_sequence_length:
            return -1
        return self.max_decoded_length - self.token_multiple  # the start token, and what fills up

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
            )
        if len(self.sequences) == self.max_requests:
            raise RequestOverflowError(f"{self.max_requests} texts run already")
        self.sequences[request_id] = DecodedSequence(
            request_id, [self.start_token], 1 + wanted, slot=0, encoder_tokens=ids
        )

    def remove_request(self, request_id: int) -> None:
        """Forget a text."""
        del self.sequences[request_id]

    def has_unfinished_requests(self) -> bool:
        return bool(self.sequences)

    # --- a pass ---------------------------------------------------------------------------------------

    def initialize_attention_state(self) -> None:
        """The next pass is over all texts."""
        self._plan = DecoderPlan([Part(sequence, 0, len(sequence.tokens)) for sequence in self.sequences.values()])

    @property
    def plan(self) -> DecoderPlan:
        """Of the pass that runs."""
        assert self._plan is not None, "initialize_attention_state comes first"
        return self._plan

    def running(self) -> list[DecodedSequence]:
        """The texts of the pass, in their order."""
        return [self.sequences[part.sequence.request_id] for part in self.plan.parts]

    def current_input_ids(self) -> Tensor:
        """[b, d] tokens of the decoder, rows filled up on the right."""
        rows = [part.sequence.tokens for part in self.plan.parts]
        longest = -(-max(map(len, rows)) // self.token_multiple) * self.token_multiple
        ids = torch.tensor([row + [self.start_token] * (longest - len(row)) for row in rows], dtype=torch.int64)
        return ids.to(device.current_device())

    def current_position_ids(self) -> Tensor:
        """[b, d] where they stand in their texts."""
        ids = self.current_input_ids()
        return torch.arange(ids.size(1), device=ids.device).expand_as(ids)

    def output_positions(self) -> Tensor:
        """[b, d] bool: the last token of each text."""
        ends = torch.tensor([part.stop - 1 for part in self.plan.parts], device=device.current_device())
        return self.current_position_ids() == ends[:, None]

    def update_requests(self, active_requests_mask: Tensor, new_tokens: Tensor) -> None:
        """After a pass: texts that are not active any more are forgotten, the others get their new token."""
        for part, is_active, token in zip(self.plan.parts, active_requests_mask.tolist(), new_tokens.tolist()):
            if is_active:
                part.sequence.tokens.append(token)
            else:
                self.remove_request(part.sequence.request_id)
        self._plan = None

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        softmax_scale: float,
        window_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Raises RuntimeError: a decoder's layers run without a context."""
        raise RuntimeError(f"layer {layer_number} asks for a memory that this context does not have")
