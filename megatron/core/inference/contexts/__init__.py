"""What a model remembers of the tokens it has seen."""

from .base_context import BaseInferenceContext
from .dynamic_chunk_allocator import ChunkAllocator
from .dynamic_context import DynamicInferenceContext
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
    "ChunkAllocator",
    "ChunkOverflowError",
    "ContextOverflowError",
    "DynamicInferenceContext",
    "MaxSequenceLengthOverflowError",
    "RequestOverflowError",
    "StaticInferenceContext",
    "TokenOverflowError",
]
