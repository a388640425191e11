"""What a model remembers of the tokens it has seen."""

from .base_context import BaseInferenceContext
from .cache_sizes import CacheSizes, cache_sizes_of
from .dynamic_chunk_allocator import ChunkAllocator
from .dynamic_context import DynamicInferenceContext
from .encoder_decoder_context import EncoderDecoderContext
from .overflow import (
    ChunkOverflowError,
    ContextOverflowError,
    MaxSequenceLengthOverflowError,
    RequestOverflowError,
    TokenOverflowError,
)
from .static_context import StaticInferenceContext

__all__ = [
    "BaseInferenceContext",
    "CacheSizes",
    "ChunkAllocator",
    "ChunkOverflowError",
    "ContextOverflowError",
    "DynamicInferenceContext",
    "EncoderDecoderContext",
    "MaxSequenceLengthOverflowError",
    "RequestOverflowError",
    "StaticInferenceContext",
    "TokenOverflowError",
    "cache_sizes_of",
]
