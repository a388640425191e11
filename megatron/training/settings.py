"""The resolved settings of a program: values, where each comes from, and a lock once they are final."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


class ConfigurationError(ValueError):
    """A setting, or a combination of settings, that cannot work; the message says what would."""


def refuse_unless(condition: object, message: str) -> None:
    """Stop with `message`, before anything has been touched, unless `condition` holds.

    Raises:
        ConfigurationError: it does not.
    """
    if not condition:
        raise ConfigurationError(message)


def warn(args: argparse.Namespace, message: str) -> None:
    """Say something about the settings, once: on the first rank."""
    if getattr(args, "rank", 0) == 0:
        logger.warning(message)


@contextmanager
def configuration_errors_end_the_program() -> Iterator[None]:
    """A refused configuration ends every rank with status 2; the first one says why, without a traceback."""
    try:
        yield
    except ConfigurationError as error:
        if int(os.getenv("RANK", "0")) == 0:
            sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {error}\n")
        raise SystemExit(2) from error


@dataclass(frozen=True)
class Source:
    """Where a value comes from."""

    kind: str
    """default, flag, yaml, environment, checkpoint, program or rule."""
    name: str = ""
    """The flag, file, variable or rule."""

    @property
    def given(self) -> bool:
        """Somebody asked for the value."""
        return self.kind not in ("default", "rule")

    def __str__(self) -> str:
        words = {
            "default": "default",
            "flag": f"flag {self.name}",
            "yaml": f"YAML file {self.name}",
            "environment": f"environment variable {self.name}",
            "checkpoint": f"checkpoint {self.name}",
            "program": "default of this program",
            "rule": f"derived by {self.name}",
        }
        return words[self.kind]


DEFAULT = Source("default")
_PRIVATE = ("_sources", "_defaults", "_frozen")


class Settings(argparse.Namespace):
    """A namespace that knows where its values come from and can be locked.

    `vars()` and iteration show the settings alone.
    """

    __slots__ = _PRIVATE

    def __init__(self, **values: Any) -> None:
        object.__setattr__(self, "_sources", {})
        object.__setattr__(self, "_defaults", {})
        object.__setattr__(self, "_frozen", False)
        super().__init__(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PRIVATE:
            self._refuse_if_frozen(name)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_if_frozen(name)
        object.__delattr__(self, name)

    def _refuse_if_frozen(self, name: str) -> None:
        if getattr(self, "_frozen", False):
            found = getattr(self, name, None)
            raise AttributeError(
                f"args.{name} is final ({found!r}, {self.source(name)}) and cannot be changed any more; "
                "what changes during a run belongs to the training state, and a variant is made by "
                "args.variant(...)"
            )

    # --- where values come from ---

    def source(self, name: str) -> Source:
        """Where the value of `name` comes from."""
        return self._sources.get(name, DEFAULT)

    def default(self, name: str) -> Any:
        """The default of `name`; None for a setting that only rules make."""
        return self._defaults.get(name)

    def remember_defaults(self) -> None:
        """Take the present values as the defaults."""
        object.__setattr__(self, "_defaults", dict(vars(self)))

    def add(self, name: str, default: Any) -> None:
        """A setting without a flag, at its default."""
        setattr(self, name, default)
        self._defaults[name] = default

    def put(self, name: str, value: Any, source: Source) -> None:
        """Set a value and note its source."""
        setattr(self, name, value)
        self._sources[name] = source

    def note(self, name: str, source: Source) -> None:
        """Note the source of a value that is set already."""
        self._sources[name] = source

    def note_changes(self, before: Mapping[str, Any], source: Source) -> None:
        """Note `source` for every setting that is no longer as in `before`."""
        for name, value in vars(self).items():
            old = before.get(name, _NOTHING)
            if value is not old and _differ(value, old):
                self._sources[name] = source

    # --- copies and the lock ---

    def freeze(self) -> Settings:
        """Lock the settings: from now on assigning to one raises."""
        object.__setattr__(self, "_frozen", True)
        return self

    @property
    def frozen(self) -> bool:
        """Whether the settings are locked."""
        return self._frozen

    def variant(self, **changes: Any) -> Settings:
        """An unlocked copy with some values changed."""
        copy = Settings(**{**vars(self), **changes})
        object.__setattr__(copy, "_sources", dict(self._sources))
        object.__setattr__(copy, "_defaults", dict(self._defaults))
        return copy

    def plain(self) -> argparse.Namespace:
        """The values alone, as checkpoints keep them."""
        return argparse.Namespace(**vars(self))


def source_of(args: argparse.Namespace, name: str) -> Source:
    """Where a value comes from; unknown in a plain namespace, which counts as default."""
    return args.source(name) if isinstance(args, Settings) else DEFAULT


def was_given(args: argparse.Namespace, name: str) -> bool:
    """Whether somebody asked for the value of `name`, rather than a default or a rule."""
    return source_of(args, name).given


_NOTHING = object()


def _differ(value: Any, other: Any) -> bool:
    return type(value) is not type(other) or value != other
