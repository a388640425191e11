"""What the cross-field rules of the configuration classes are written with."""

from __future__ import annotations

from typing import Any


def require(condition: object, message: str) -> None:
    """Refuse a configuration.

    Raises:
        ValueError: `condition` is false; `message` names the fields, their values and what would work.
    """
    if not condition:
        raise ValueError(message)


def shown(config: Any, *names: str) -> str:
    """Fields with their values, for messages: `hidden_size (10) and num_layers (2)`."""
    return " and ".join(f"{name} ({getattr(config, name)})" for name in names)


def require_divisible(config: Any, name: str, *, by: str) -> None:
    """Refuse a `name` that is not a multiple of the field `by`."""
    divisor = getattr(config, by)
    require(
        divisor > 0 and getattr(config, name) % divisor == 0,
        f"{shown(config, name)} must be divisible by {shown(config, by)}",
    )


def require_together(config: Any, name: str, *needed: str) -> None:
    """Refuse a `name` that is set while one of the `needed` fields is not."""
    if getattr(config, name):
        missing = [other for other in needed if not getattr(config, other)]
        require(not missing, f"{shown(config, name)} needs {', '.join(missing)} to be set as well")


def require_one_of(config: Any, name: str, choices: tuple[Any, ...]) -> None:
    """Refuse a value of `name` outside of `choices`."""
    value = getattr(config, name)
    require(value in choices, f"{name} is {value!r}; it can be {', '.join(map(repr, choices))}")
