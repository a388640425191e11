"""Decoder-only models."""
