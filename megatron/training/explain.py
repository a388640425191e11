"""Says what the settings are and why."""

from __future__ import annotations

import argparse
import enum
import sys
from typing import Any

import torch

from megatron.training.rules.precision import DTYPES
from megatron.training.settings import Settings, source_of

WIDTH = 48
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def format_args(args: argparse.Namespace, title: str = "arguments") -> str:
    """Every setting on a line of its own between two banners, sorted without regard to case."""
    lines = [f"  {name} {'.' * (WIDTH - len(name))} {value}" for name, value in vars(args).items()]
    banner, end = f"{'-' * 24} {title} {'-' * 24}", f"{'-' * 20} end of {title} {'-' * 21}"
    return "\n".join([banner, *sorted(lines, key=str.lower), end])


def print_args(args: argparse.Namespace, title: str = "arguments") -> None:
    """Show every setting."""
    print(format_args(args, title), flush=True)


def explain_and_exit_if_asked(args: argparse.Namespace) -> None:
    """With `--explain-config`: say where every setting comes from (first rank only) and end with status 0."""
    if not getattr(args, "explain_config", False):
        return
    if getattr(args, "rank", 0) == 0:
        print(explain(args), flush=True)
    sys.exit(0)


def explain(args: argparse.Namespace) -> str:
    """A table of the settings that differ from their defaults: name, value, source, default."""
    rows = [
        (name, shown(value), str(source_of(args, name)), default_shown(args, name))
        for name, value in sorted(vars(args).items(), key=lambda item: item[0].lower())
        if differs_from_default(args, name, value)
    ]
    header = ("setting", "value", "source", "default")
    widths = [min(max(len(row[i]) for row in (header, *rows)), WIDTH) for i in range(3)]
    lines = ["  ".join((*(cell.ljust(w) for cell, w in zip(row, widths)), row[3])).rstrip() for row in (header, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def differs_from_default(args: argparse.Namespace, name: str, value: Any) -> bool:
    """Whether a value is worth a line: settings that only rules make are, unless they say nothing."""
    if name == "explain_config":
        return False
    if not isinstance(args, Settings):
        return True
    return value != args.default(name) and shown(value) != default_shown(args, name)


def default_shown(args: argparse.Namespace, name: str) -> str:
    """The default for the last column; empty where there is none."""
    default = args.default(name) if isinstance(args, Settings) else None
    return shown(default) if default is not None else ""


def shown(value: Any) -> str:
    """A value in the words of the command line."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
