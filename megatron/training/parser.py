"""A command-line parser of derived flags: exact names, grouped help, "did you mean" for misspelt ones."""

from __future__ import annotations

import argparse
import difflib
import enum
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron.training.config import FLAG_GROUPS
from megatron.training.config.flags import Flag, MemberOf, all_flags
from megatron.training.settings import Settings, Source


class FlagParser(argparse.ArgumentParser):
    """Parses into `Settings`, noting for each value the flag that gave it."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(
            usage="%(prog)s [flags]",
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        for name, action in _NOTED_ACTIONS.items():
            self.register("action", name, action)

    def parse_settings(self, argv: Sequence[str] | None, *, ignore_unknown: bool) -> Settings:
        """The values of `argv` (default: the command line) and of all defaults."""
        settings, unknown = self.parse_known_args(argv, namespace=self.defaults())
        if unknown and not ignore_unknown:
            self.refuse_unknown(unknown)
        return settings

    def defaults(self) -> Settings:
        """All defaults as settings."""
        settings = Settings()
        for action in self._actions:
            if action.dest != argparse.SUPPRESS and action.default is not argparse.SUPPRESS:
                setattr(settings, action.dest, _own_copy(action.default))
        settings.remember_defaults()
        return settings

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Stop with status 2, naming what is unknown and what it may have meant."""
        names = [word.split("=")[0] for word in unknown if word.startswith("--")] or list(unknown)
        self.error("\n".join(f"unknown flag {name}{self._meant(name)}" for name in names))

    def _meant(self, name: str) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        dashed = "--" + name.lstrip("-").replace("_", "-")
        close = [dashed] if dashed in known else difflib.get_close_matches(dashed, known, n=2, cutoff=0.75)
        return f"; did you mean {' or '.join(close)}?" if close else ""

    def error(self, message: str) -> NoReturn:
        """Stop with status 2; the first rank says why (the usage of five hundred flags would bury it)."""
        first = int(os.getenv("RANK", "0")) == 0
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists all flags)\n" if first else None)

    def format_help(self) -> str:
        """Help with the fields' docstrings, which are read only now."""
        for action in self._actions:
            flag = all_flags().get(action.dest)
            if flag is not None and not flag.hidden:
                action.help = flag.help.replace("%", "%%")
        return super().format_help()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every derived flag to `parser`, under its heading."""
    headings = {group.title: parser.add_argument_group(group.title) for group in FLAG_GROUPS if not group.hidden}
    for flag in all_flags().values():
        headings.get(flag.group, parser).add_argument(*flag.names, **_parser_words(flag))


def _parser_words(flag: Flag) -> dict[str, Any]:
    words: dict[str, Any] = {"dest": flag.dest, "default": flag.default}
    if flag.hidden:
        words["help"] = argparse.SUPPRESS
    if flag.switch:
        return words | {"action": "store_false" if flag.default is True else "store_true"}
    if isinstance(flag.type, MemberOf):
        words["metavar"] = "{" + ",".join(flag.type.names) + "}"
    if flag.choices:
        words["choices"] = flag.choices
    if flag.nargs is not None:
        words["nargs"] = flag.nargs
    if flag.one_or_more:
        words["action"] = StoreOneOrMore
    return words | {"type": flag.type}


def _own_copy(default: Any) -> Any:
    """Lists are copied, so that changing one run's value leaves the parser's default alone."""
    return list(default) if isinstance(default, list) else default


class _HelpFormatter(argparse.HelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.nargs == 0 or default is None or default in ([], "", argparse.SUPPRESS):
            return text
        shown = default.name if isinstance(default, enum.Enum) else default
        return f"{text} (default: {str(shown).replace('%', '%%')})"


class StoreOneOrMore(argparse._StoreAction):
    """Stores several values as a list, and one as it is."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _noting(base: type[argparse.Action]) -> type[argparse.Action]:
    """`base`, which also notes the flag as the value's source."""

    class NotedAction(base):  # type: ignore[valid-type, misc]
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            super().__call__(parser, namespace, values, option_string)
            if isinstance(namespace, Settings):
                namespace.note(self.dest, Source("flag", option_string or self.dest))

    return NotedAction


_NOTED_ACTIONS: dict[Any, type[argparse.Action]] = {
    None: _noting(argparse._StoreAction),
    "store": _noting(argparse._StoreAction),
    "store_true": _noting(argparse._StoreTrueAction),
    "store_false": _noting(argparse._StoreFalseAction),
    "store_const": _noting(argparse._StoreConstAction),
    "append": _noting(argparse._AppendAction),
    StoreOneOrMore: _noting(StoreOneOrMore),
}
