"""Context parallelism: sequences cut over ranks, and attention across the cuts."""

from megatron.core.transformer.context_parallel.attention import ContextParallelAttention, attend_across_ranks

__all__ = ["ContextParallelAttention", "attend_across_ranks"]
