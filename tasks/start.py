"""Starting a task that only evaluates."""

from __future__ import annotations

from typing import Any

from megatron.training import initialize_megatron


def start(args: Any, defaults: dict[str, Any]) -> None:
    """Check the settings, start torch.distributed and build the tokenizer.

    Args:
        defaults: values for settings that nobody has set.
    """
    initialize_megatron(parsed_args=args, args_defaults=defaults)
