"""From a command line to complete, checked settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.training.config.flags import in_terms_of_flags, layer_pattern
from megatron.training.library_configs import (
    core_transformer_config_from_args as core_transformer_config_from_args,
)
from megatron.training.parser import FlagParser, add_flags
from megatron.training.rules import apply_rules
from megatron.training.rules.batch import require_training_length
from megatron.training.rules.checkpoint import require_load_for_checkpoint_args
from megatron.training.settings import Settings, Source, warn
from megatron.training.yaml_arguments import apply_yaml

ExtraFlags = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

moe_freq_type = layer_pattern
no_rope_freq_type = layer_pattern

WITHOUT_FLAG: dict[str, Any] = {
    "padded_vocab_size": None,
    "hf_vocab_size": None,
    "virtual_pipeline_model_parallel_size": None,
    "variable_seq_lengths": False,
    "model_family": None,
}
"""Settings that rules, checkpoints or the tokenizer decide."""

ENVIRONMENT = {"rank": ("RANK", 0), "world_size": ("WORLD_SIZE", 1), "local_rank": ("LOCAL_RANK", 0)}
"""What a launcher tells each process."""


def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of a training program to `parser`, grouped."""
    add_flags(parser)
    return parser


def parse_args(
    extra_args_provider: ExtraFlags | None = None,
    ignore_unknown_args: bool = False,
    argv: Sequence[str] | None = None,
) -> Settings:
    """The settings of a command line (default: this process's), not yet checked against each other.

    Sources, later ones win: defaults, the launcher's environment, a YAML file, flags. A flag that does not
    exist ends the program with status 2.

    Args:
        extra_args_provider: adds a program's own flags to the parser and returns it.
        ignore_unknown_args: leave flags that do not exist alone.

    Raises:
        ConfigurationError: the YAML file, or taking arguments from a checkpoint, cannot work.
    """
    parser = build_parser(extra_args_provider)
    args = parser.parse_settings(argv, ignore_unknown=ignore_unknown_args)
    add_environment(args)
    if args.yaml_cfg:
        apply_yaml(args, args.yaml_cfg, parser)
    for name, default in WITHOUT_FLAG.items():
        args.add(name, default)
    apply_rules(args, (require_load_for_checkpoint_args,))
    return args


def build_parser(extra_args_provider: ExtraFlags | None = None) -> FlagParser:
    """A parser of all flags, a program's own included."""
    parser = FlagParser(description="Train a transformer language model.")
    add_flags(parser)
    if extra_args_provider is not None:
        extra_args_provider(parser)
    return parser


def add_environment(args: Settings) -> None:
    """Rank, number of ranks and rank on this machine as the launcher says; one process without launcher."""
    for name, (variable, default) in ENVIRONMENT.items():
        if args.source(name).kind != "flag":
            args.add(name, default)
            if variable in os.environ:
                args.put(name, int(os.environ[variable]), Source("environment", variable))


def validate_args(
    args: argparse.Namespace, defaults: Mapping[str, Any] | None = None, *, for_training: bool = False
) -> argparse.Namespace:
    """Derive what is not given, and refuse what cannot work. Changes `args` in place and returns it.

    No process group, device or file has been touched when this returns or raises.

    Args:
        defaults: a program's own defaults, for values that are None.
        for_training: the program trains, so the length of the run is required.

    Raises:
        ConfigurationError: a rule refuses; the message names the flags, their values and what would work.
    """
    environment = {name: int(os.getenv(variable, default)) for name, (variable, default) in ENVIRONMENT.items()}
    for name, value in (environment | WITHOUT_FLAG).items():
        if not hasattr(args, name):
            setattr(args, name, value)
    apply_program_defaults(args, defaults or {})
    apply_rules(args)
    if for_training:
        apply_rules(args, (require_training_length,))
    return args


def apply_program_defaults(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Set what nobody has set; what somebody has set stays, with a warning where it differs."""
    for name, value in defaults.items():
        found = getattr(args, name, None)
        if found is None:
            if isinstance(args, Settings):
                args.put(name, value, Source("program"))
            else:
                setattr(args, name, value)
        elif found != value:
            flag = in_terms_of_flags(name)
            warn(args, f"{flag} is {found!r} instead of this program's default {value!r}")
