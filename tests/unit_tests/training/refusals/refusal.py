"""One row of the tables beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.unit_tests.training.settings_for_tests import SMALL_GPT


@dataclass(frozen=True)
class Refusal:
    """What `rule` says of a command line or, with `values`, of settings changed after they were checked."""

    rule: Any
    message: str
    """A regular expression."""
    flags: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    """For rules that stand behind a capability not built yet, or behind another rule."""
    base: str = SMALL_GPT
    world_size: int = 1

    def __str__(self) -> str:
        changes = " ".join(f"{name}={value}" for name, value in self.values.items())
        return f"{self.rule.__name__}: {self.flags or changes}"
