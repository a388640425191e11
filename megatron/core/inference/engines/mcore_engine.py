"""The former name of `StaticInferenceEngine`."""

from megatron.core.inference.engines.static_engine import StaticInferenceEngine as MCoreEngine

__all__ = ["MCoreEngine"]
