"""The former name of `StaticInferenceContext`."""

from megatron.core.inference.contexts.static_context import StaticInferenceContext as InferenceParams

__all__ = ["InferenceParams"]
