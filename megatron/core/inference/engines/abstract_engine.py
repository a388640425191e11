"""What every engine does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class AbstractEngine(ABC):
    """Takes requests and gives texts."""

    @abstractmethod
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Requests, completed, in the order of the prompts."""
