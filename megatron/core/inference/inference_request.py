"""A text to be continued, and what has become of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from megatron.core.inference.sampling_params import SamplingParams


class Status(Enum):
    """How far a request is."""

    WAITING_IN_QUEUE = 1
    ACTIVE_AND_GENERATING_TOKENS = 2
    ACTIVE_BUT_NOT_GENERATING_TOKENS = 3
    COMPLETED = 4


class FinishReason(Enum):
    """Why a text ends."""

    STOP = "stop"
    """At an end-of-document or stop token."""

    LENGTH = "length"
    """At the number of tokens that were asked for, or that the model can look at."""

    CANCELLED = "cancelled"


@dataclass(kw_only=True)
class InferenceRequest:
    """A request of the static engine. n prompt tokens, m generated tokens."""

    request_id: str
    prompt: str
    sampling_params: SamplingParams | None = None
    inference_parameters: SamplingParams | None = None
    """The former name of `sampling_params`."""
    prompt_tokens: list[int] | None = None
    arrival_time: float | None = None
    """Seconds since the epoch."""
    status: Status | None = None
    encoder_prompt: str | None = None
    generated_text: str | None = None
    segments: list[str] | None = None
    """The text of each token, the prompt's included."""
    generated_segments: list[str] | None = None
    generated_sequence_lengths: list[int] | None = None
    generated_tokens: Tensor | None = None
    prompt_log_probs: Tensor | None = None
    """[n - 1]: of each prompt token but the first, given those before it."""
    generated_log_probs: Tensor | None = None
    """[m]"""
    prompt_top_n_logprobs: list[dict[str, float]] | None = None
    generated_top_n_logprobs: list[dict[str, float]] | None = None
    generated_length: int | None = None

    def __post_init__(self) -> None:
        if self.sampling_params is None:
            self.sampling_params = self.inference_parameters


@dataclass(kw_only=True)
class DynamicInferenceRequest(InferenceRequest):
    """A request of the dynamic engine."""

    request_id: int  # type: ignore[assignment]
    prompt: str | None = None  # type: ignore[assignment]
    prompt_tokens: list[int] | None = None
    generated_tokens: list[int] = field(default_factory=list)  # type: ignore[assignment]
    prompt_log_probs: list[float] | None = None  # type: ignore[assignment]
    generated_log_probs: list[float] | None = None  # type: ignore[assignment]
    prompt_top_n_token_logprobs: list[list[tuple[int, float]]] | None = None
    """For each prompt token but the first: (token, log-probability) of the most likely ones, best first."""
    generated_top_n_token_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: FinishReason | None = None
    generator: torch.Generator | None = field(default=None, repr=False)
    """The random stream it draws from."""

    @property
    def tokens(self) -> list[int]:
        """Prompt and generated tokens."""
        return [*(self.prompt_tokens or ()), *self.generated_tokens]


@dataclass(kw_only=True)
class VLMInferenceRequest(InferenceRequest):
    """A request of the static engine whose prompt has images, a token for each."""

    num_img_embeddings_per_tile: int
    imgs: Tensor
    """[tiles of all images, ...]"""
    num_tiles: Tensor
    """[images] int: how many tiles each has."""
    decoder_seq_length: int
    """Tokens and embeddings that the prompt may have together."""
