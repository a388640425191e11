"""Planted mistakes, one line each, that the fast selection must notice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


def planted(name: str | None) -> AbstractContextManager:
    """A context in which the mistake is in place."""
    return nullcontext()
