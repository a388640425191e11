"""Bidirectional encoders."""

from __future__ import annotations

from megatron.core.models.bert.bert_model import BertModel

__all__ = ["BertModel"]
