"""Requests in, texts out."""

from .abstract_engine import AbstractEngine
from .dynamic_engine import DynamicInferenceEngine

__all__ = ["AbstractEngine", "DynamicInferenceEngine"]
