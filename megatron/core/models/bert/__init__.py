"""Bidirectional encoders."""

from __future__ import annotations

from megatron.core.models.bert.bert_classifier import BertClassifier
from megatron.core.models.bert.bert_model import BertModel

__all__ = ["BertClassifier", "BertModel"]
