"""Settings from a YAML file: the names of the flags' arguments, or of the library's fields; flags win.

    micro_batch_size: 4
    language_model:          # the blocks are optional, their keys count like the others
      num_layers: 12
      activation_func: swiglu
    model_parallel:
      tensor_model_parallel_size: 2
    save: ${HOME}/checkpoints

In the public behaviour the file replaces the whole command line, which leaves flags without effect; here a
flag that is given wins over the file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterator
from typing import Any

from megatron.training.config.flags import all_flags, layer_pattern
from megatron.training.library_configs import core_transformer_config_from_args
from megatron.training.parser import StoreOneOrMore
from megatron.training.settings import ConfigurationError, Settings, Source, refuse_unless

BLOCKS = ("language_model", "model_parallel")
ACTIVATIONS = {"swiglu": "swiglu", "squaredrelu": "squared_relu", "gelu": None}
PLACEHOLDER = re.compile(r"\$\{(\w+)\}")


def apply_yaml(args: Settings, path: str, parser: argparse.ArgumentParser) -> None:
    """Set what the YAML file at `path` says and no flag has said.

    Raises:
        ConfigurationError: the file cannot be read, or holds an unknown key or an unusable value.
    """
    names = known_names(parser)
    actions = {action.dest: action for action in parser._actions}
    for key, value in flat_items(read_yaml(path), path):
        if key == "activation_func":
            switch = activation_switch(value, path)
            if switch is None:
                continue
            key, value = switch, True
        refuse_unless(key.replace("-", "_") in names, unknown_key(key, path, list(names)))
        dest, inverted = names[key.replace("-", "_")]
        converted = convert(actions[dest], value, f"{path}: {key}")
        if args.source(dest).kind != "flag":
            args.put(dest, not converted if inverted else converted, Source("yaml", path))


def known_names(parser: argparse.ArgumentParser) -> dict[str, tuple[str, bool]]:
    """Every accepted key: names of arguments, and of library fields (which may be inverted)."""
    names = {action.dest: (action.dest, False) for action in parser._actions if action.dest != "help"}
    for flag in all_flags().values():
        names.setdefault(flag.field, (flag.dest, flag.inverted))
    return names


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, its `${NAME}` placeholders replaced from the environment."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError("--yaml-cfg needs the package PyYAML (pip install pyyaml)") from error
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--yaml-cfg {path} cannot be read: {error}") from error
    refuse_unless(content is None or isinstance(content, dict), f"--yaml-cfg {path} must hold `name: value` lines")
    return fill_placeholders(content or {}, path)


def fill_placeholders(value: Any, path: str) -> Any:
    """`value` with every `${NAME}` in its texts replaced by that environment variable."""
    if isinstance(value, dict):
        return {key: fill_placeholders(each, path) for key, each in value.items()}
    if isinstance(value, list):
        return [fill_placeholders(each, path) for each in value]
    if isinstance(value, str):
        for name in PLACEHOLDER.findall(value):
            refuse_unless(
                name in os.environ,
                f"--yaml-cfg {path}: the environment variable {name} in {value!r} is not set",
            )
        return PLACEHOLDER.sub(lambda found: os.environ[found[1]], value)
    return value


def flat_items(content: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of the blocks included; a key may come once."""
    seen: set[str] = set()
    for name, value in content.items():
        block = value if name in BLOCKS and isinstance(value, dict) else {name: value}
        for key, each in block.items():
            refuse_unless(key not in seen, f"--yaml-cfg {path}: {key} is given twice")
            seen.add(key)
            yield str(key), each


def activation_switch(value: Any, path: str) -> str | None:
    """The switch that chooses an activation by its name; none for the default one."""
    refuse_unless(
        value in ACTIVATIONS,
        f"--yaml-cfg {path}: activation_func {value!r} can be {', '.join(ACTIVATIONS)}",
    )
    return ACTIVATIONS[value]


def unknown_key(key: str, path: str, names: list[str]) -> str:
    """What to say about a key that does not exist."""
    close = difflib.get_close_matches(key.replace("-", "_"), names, n=2, cutoff=0.7)
    return f"--yaml-cfg {path}: unknown key {key}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def convert(action: argparse.Action, value: Any, where: str) -> Any:
    """`value` in the type that the flag would have given it.

    YAML reads `3e-4` as text and `1` as a whole number where a fraction is meant.
    """
    if value is None:
        return None
    if action.nargs == 0:
        refuse_unless(isinstance(value, bool), f"{where}: {value!r} must be true or false")
        return value
    try:
        if action.nargs is not None:
            items = value if isinstance(value, list) else str(value).split()
            checked = [_checked(action, item, where) for item in items]
            return checked[0] if isinstance(action, StoreOneOrMore) and len(checked) == 1 else checked
        if action.type is layer_pattern and isinstance(value, list):
            return [int(item) for item in value]
        return _checked(action, value, where)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ConfigurationError(f"{where}: {value!r} cannot be used: {error}") from error


def _checked(action: argparse.Action, value: Any, where: str) -> Any:
    refuse_unless(
        not isinstance(value, (dict, list, bool)) or action.type is bool,
        f"{where}: {value!r} is not one value",
    )
    kind: Any = action.type if callable(action.type) else str
    converted = kind(str(value)) if kind is not bool else bool(value)
    refuse_unless(
        action.choices is None or converted in action.choices,
        f"{where}: {value!r} can be {', '.join(map(str, action.choices or ()))}",
    )
    return converted


def core_transformer_config_from_yaml(args: argparse.Namespace, transfomer_key: str = "language_model") -> Any:
    """The transformer's configuration; settings from a YAML file are in `args` like all others."""
    return core_transformer_config_from_args(args)
