"""Requests in, texts out."""

from .abstract_engine import AbstractEngine
from .dynamic_engine import DynamicInferenceEngine
from .static_engine import StaticInferenceEngine

__all__ = ["AbstractEngine", "DynamicInferenceEngine", "StaticInferenceEngine"]
