"""Keys and values of a batch whose rows all are at the same position.

s tokens of a pass, b rows, a heads, g query groups, d head width, l the greatest length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.core.inference.contexts.base_context import BaseInferenceContext

if TYPE_CHECKING:
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig


class StaticInferenceContext(BaseInferenceContext):
    """One tensor [b, g, l, d] for the keys of each layer, and one for its values, made when the layer first runs.

    Args:
        max_batch_size: rows at most.
        max_sequence_length: l.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        super().__init__(materialize_only_last_token_logits=True)
        self.max_batch_size, self.max_sequence_length = max_batch_size, max_sequence_length
        self.key_value_memory_dict: dict[int, tuple[Tensor, Tensor]] = {}
        self.reset()

    @classmethod
    def from_config(cls, config: InferenceWrapperConfig) -> StaticInferenceContext:
        """As large as the configuration of the model's wrapper says."""
        return cls(config.inference_max_requests, config.inference_max_seq_length)

    def is_static_batching(self) -> bool:
        return True

    def reset(self) -> None:
        """At the first token of the first row; what lies in the memory is not looked at any more."""
        self.sequence_len_offset = self.batch_size_offset = 0
        self.enable_prefill_mode()

    def enable_prefill_mode(self) -> None:
        """Passes are over prompts."""
        self.decode_mode = False

    def enable_decode_mode(self) -> None:
        """Passes are over single tokens."""
        self.decode_mode = True

    def is_decode_only(self) -> bool:
        return self.decode_mode

    def increment_sequence_len_offset(self, increment: int) -> None:
        self.sequence_len_offset += increment

    def increment_batch_size_offset(self, increment: int) -> None:
        self.batch_size_offset += increment

    def reset_batch_size_offset(self) -> None:
        self.batch_size_offset = 0

    def swap_key_value_dict(self, batch_idx: Sequence[int] | Tensor) -> None:
        """Row i goes on from what row `batch_idx[i]` was: for the hypotheses of a beam search."""
        rows = torch.as_tensor(batch_idx)
        for keys, values in self.key_value_memory_dict.values():
            for memory in (keys, values) if values is not keys else (keys,):
                memory[: len(rows)] = memory[rows.to(memory.device)]

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        softmax_scale: float,
        window_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """[s, b, a * dv]; see `BaseInferenceContext.attend`."""
        keys, values = self._memory(layer_number, key, value)
        rows = slice(self.batch_size_offset, self.batch_size_offset + key.size(1))
        start, stop = self.sequence_len_offset, self.sequence_len_offset + key.size(0)
        keys[rows, :, start:stop] = key.permute(1, 2, 0, 3)
        if value is not None:
            values[rows, :, start:stop] = value.permute(1, 2, 0, 3)
        mask = None
        limited = window_size is not None and window_size[0] >= 0
        if key.size(0) > 1 and start or limited:
            places = torch.arange(stop, device=query.device)
            mask = places <= places[start:, None]
            if limited:
                assert window_size is not None
                mask &= places >= places[start:, None] - window_size[0]
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys[rows, :, :stop].to(query.dtype),
            values[rows, :, :stop].to(query.dtype),
            attn_mask=mask,
            is_causal=mask is None and key.size(0) > 1,
            scale=softmax_scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _memory(self, layer_number: int, key: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        if layer_number not in self.key_value_memory_dict:
            shape = (self.max_batch_size, key.size(2), self.max_sequence_length)
            keys = key.new_zeros(*shape, key.size(3))
            values = keys if value is None else value.new_zeros(*shape, value.size(3))
            self.key_value_memory_dict[layer_number] = keys, values
        return self.key_value_memory_dict[layer_number]
