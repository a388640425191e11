"""Derives a command-line flag from a dataclass field: name, type, default, choices and help."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, Union

from megatron.training.config import FLAG_GROUPS
from megatron.training.config.spellings import SAME, SPELLINGS, Spelling
from megatron.training.field_docs import field_docs


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag with all that a parser needs to know about it."""

    group: str
    owner: type
    """The class of the field that it sets."""
    field: str
    dest: str
    names: tuple[str, ...]
    default: Any
    switch: bool = False
    """Takes no value; given, it turns a false default true and a true one false."""
    inverted: bool = False
    """The argument says that the field is off."""
    hidden: bool = False
    type: Callable[[str], Any] = str
    choices: tuple[Any, ...] = ()
    nargs: str | int | None = None
    one_or_more: bool = False
    """Several values are a list, one is not."""

    @property
    def help(self) -> str:
        """The field's docstring; a switch that turns something off says so."""
        text = field_docs(self.owner).get(self.field, "")
        return f"Turn off: {text[:1].lower()}{text[1:]}" if self.turns_off and text else text

    @property
    def turns_off(self) -> bool:
        """Whether giving the flag turns its field off."""
        return self.switch and (self.inverted or self.default is True)


@cache
def all_flags() -> dict[str, Flag]:
    """Every flag of a training program by the name of its argument."""
    derived = (
        flag_of(group.title, owner, name, hidden=group.hidden)
        for group in FLAG_GROUPS
        for owner, name in group.members()
    )
    return {flag.dest: flag for flag in derived}


@cache
def flag_names() -> dict[str, str]:
    """The flag for each argument, and for each field that is named otherwise."""
    names = {flag.field: flag.names[0] for flag in all_flags().values()}
    return names | {flag.dest: flag.names[0] for flag in all_flags().values()}


def in_terms_of_flags(message: str) -> str:
    """`message` with every field named by its flag: the words that the user has typed.

    "add_bias_linear to be off" becomes "--disable-bias-linear".
    """
    spelled = flag_names()
    turning_off = {name for flag in all_flags().values() if flag.turns_off for name in (flag.field, flag.dest)}

    def flag_for(found: re.Match[str]) -> str:
        name, off = found[1], found[2] or ""
        return spelled.get(name, name) + (off if name not in turning_off else "")

    return re.sub(r"\b([A-Za-z]\w*_\w+)\b( to be off\b)?", flag_for, message)


def flag_of(group: str, owner: type, name: str, *, hidden: bool = False) -> Flag:
    """The flag that sets field `name` of `owner`."""
    spelling = SPELLINGS.get(name, Spelling())
    default = default_of(fields_by_name(owner)[name]) if spelling.default is SAME else spelling.default
    if spelling.inverted:
        default = not default
    shape = value_shape(type_hints(owner)[name], spelling)
    off = shape.switch and default is True and not spelling.inverted
    derived_name = f"--{'no-' if off else ''}{name.replace('_', '-')}"
    return Flag(
        group=group,
        owner=owner,
        field=name,
        dest=spelling.dest or name,
        names=(spelling.flag or derived_name, *spelling.aliases),
        default=default,
        switch=shape.switch,
        inverted=spelling.inverted,
        hidden=hidden,
        type=shape.type,
        choices=shape.choices,
        nargs=shape.nargs,
        one_or_more=shape.one_or_more,
    )


# --- values ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueShape:
    """What may follow a flag."""

    type: Callable[[str], Any] = str
    choices: tuple[Any, ...] = ()
    nargs: str | int | None = None
    switch: bool = field(default=False, kw_only=True)
    one_or_more: bool = field(default=False, kw_only=True)


def value_shape(annotation: Any, spelling: Spelling) -> ValueShape:
    """What may follow a flag whose field has type `annotation`."""
    if spelling.type is not None:
        return ValueShape(spelling.type, spelling.choices, spelling.nargs)
    kinds = [kind for kind in union_members(annotation) if kind is not type(None)]
    if len(kinds) == 2 and int in kinds and list[int] in kinds:
        return ValueShape(layer_pattern)
    if len(kinds) == 2 and list[kinds[0]] == kinds[1]:  # type: ignore[valid-type]
        return replace(value_shape(kinds[0], spelling), nargs="+", one_or_more=True)
    (kind,) = kinds
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return ValueShape(switch=True)
    if origin is Literal:
        return ValueShape(type(arguments[0]), arguments)
    if origin is list:
        return ValueShape(arguments[0], (), spelling.nargs or ("+" if arguments[0] is int else "*"))
    if origin is tuple:
        return ValueShape(arguments[0], (), len(arguments))
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return ValueShape(MemberOf(kind))
    return ValueShape(kind)


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a plain type is its own only one."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


class MemberOf:
    """Turns a name into the member of an enumeration."""

    def __init__(self, kind: type[enum.Enum]) -> None:
        self.kind = kind
        self.names = tuple(member.name for member in kind)

    def __call__(self, name: str) -> enum.Enum:
        if name not in self.names:
            raise_bad_value(f"{name!r} is none of {', '.join(self.names)}")
        return self.kind[name]

    def __repr__(self) -> str:
        return self.kind.__name__


def layer_pattern(text: str) -> int | list[int]:
    """A period, as `2`, or a list of layers written as an expression, as `([1]+[0]*3)*2`.

    Only digits, commas, brackets, `+` and `*` may occur; the expression is computed, never evaluated as code.
    """
    if "[" not in text:
        return int(text)
    if set(text) - set("0123456789,[]()+* "):
        raise_bad_value(f"{text!r} may hold only digits, commas, brackets, + and *")
    try:
        pattern = _compute(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError):
        pattern = None
    if not isinstance(pattern, list):
        raise_bad_value(f"{text!r} is not a list of numbers, such as [0,1]*4")
    return pattern


def _compute(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.List(elts=items):
            return [_compute(item) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _compute(left) + _compute(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _compute(left) * _compute(right)
    raise TypeError(f"{ast.dump(node)} is not part of a layer pattern")


def raise_bad_value(message: str) -> typing.NoReturn:
    """Refuse a value in the way that the parser reports with the flag's name."""
    from argparse import ArgumentTypeError

    raise ArgumentTypeError(message)


# --- dataclasses ----------------------------------------------------------------------------------


@cache
def fields_by_name(owner: type) -> dict[str, Field[Any]]:
    """The fields of a dataclass."""
    return {each.name: each for each in fields(owner)}


@cache
def type_hints(owner: type) -> dict[str, Any]:
    """The evaluated annotations of a dataclass."""
    return typing.get_type_hints(owner)


def default_of(described: Field[Any]) -> Any:
    """A field's default, made anew where it has a factory."""
    if described.default_factory is not MISSING:
        return described.default_factory()
    return described.default
