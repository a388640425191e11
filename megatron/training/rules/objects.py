"""The last rule: the settings make valid configuration objects of the library."""

from __future__ import annotations

import argparse

from megatron.training.library_configs import (
    core_transformer_config_from_args,
    ddp_config_from_args,
    optimizer_config_from_args,
)


def require_valid_library_configs(args: argparse.Namespace) -> None:
    """The library's own rules hold; checked here, before any process waits for another."""
    core_transformer_config_from_args(args)
    optimizer_config_from_args(args)
    ddp_config_from_args(args)
