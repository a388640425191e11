"""What every context offers to the layers of a model.

s tokens of a pass, b rows, a heads, g query groups, d head width; a and g of one tensor parallel rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class BaseInferenceContext(ABC):
    """The memory of a model between passes. A model that gets one computes new tokens only.

    Args:
        materialize_only_last_token_logits: only logits from which a token is drawn are computed.
    """

    max_sequence_length: int
    """Tokens of the longest text."""

    continues_prompts = True
    """A text goes on from its prompt; otherwise it is an answer to it."""

    def __init__(self, materialize_only_last_token_logits: bool) -> None:
        self.materialize_only_last_token_logits = materialize_only_last_token_logits

    @abstractmethod
    def is_static_batching(self) -> bool:
        """All rows of a batch are at the same position."""

    def is_dynamic_batching(self) -> bool:
        """Each text is at a position of its own, and all lie on one row."""
        return not self.is_static_batching()

    @abstractmethod
    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        softmax_scale: float,
        window_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """[s, b, a * dv]: what the new queries find in the keys and values so far, the new ones included. Keeps those.

        Args:
            layer_number: 1-based number of the layer in the model.
            query: [s, b, a, d].
            key: [s, b, g, d].
            value: [s, b, g, dv]; None where each key is its own value (latent attention keeps one tensor).
            window_size: (keys before, keys after) that a query sees at most; None and -1 are no limit.
        """

    def attend_with_bias(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        softmax_scale: float,
        attention_bias: Tensor,
    ) -> Tensor:
        """As `attend`, with what is added to the scores, which also hides what must not be seen.

        Raises:
            NotImplementedError: this context has none.
        """
        raise NotImplementedError(f"layer {layer_number}: {type(self).__name__} adds no bias to scores")

    def increment_sequence_len_offset(self, increment: int) -> None:
        """All rows have gone this many tokens further. Static batching only."""
        assert self.is_static_batching()

    def increment_batch_size_offset(self, increment: int) -> None:
        """The next pass is over the rows behind those of the last one. Static batching only."""
        assert self.is_static_batching()

    def reset_batch_size_offset(self) -> None:
        """The next pass is over the first rows. Static batching only."""
        assert self.is_static_batching()
