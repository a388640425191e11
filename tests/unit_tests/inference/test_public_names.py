"""Names that programs of this kind import for generation: where they are, what they are, the parameters they take."""

from __future__ import annotations

import csv
import dataclasses
import enum
import importlib
import inspect
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

ROWS = list(csv.DictReader(Path(__file__).with_name("public_names.tsv").open(encoding="utf-8"), delimiter="\t"))
"""`= path` among the parameters says that the name is another one for what stands there."""

HANDED_IN = {"MegatronGenerate.put": ["request"]}
"""Parameters that must be given here and not there: FastAPI hands a request to its handler, Flask has it beside."""


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def found(row: dict[str, str]) -> Any:
    """Without binding: class and static methods as they stand in their class."""
    module, parts = importlib.import_module(row["module"]), row["name"].split(".")
    owner = reduce(getattr, parts[:-1], module)
    return inspect.getattr_static(owner, parts[-1]) if inspect.isclass(owner) else getattr(owner, parts[-1])


def is_kind(thing: Any, kind: str) -> bool:
    *marks, kind = kind.split()
    plain = getattr(thing, "__func__", thing)
    if "abstract" in marks and not getattr(plain, "__isabstractmethod__", False):
        return False
    if "async" in marks and not (inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain)):
        return False
    checks = {
        "class": inspect.isclass,
        "dataclass": dataclasses.is_dataclass,
        "enum": lambda thing: issubclass(thing, enum.Enum),
        "function": inspect.isfunction,
        "method": inspect.isfunction,
        "staticmethod": lambda thing: isinstance(thing, staticmethod),
        "classmethod": lambda thing: isinstance(thing, classmethod),
        "property": lambda thing: isinstance(thing, property),
    }
    return bool(checks[kind](thing))


def refused(thing: Any, wanted: list[str], extra: list[str]) -> list[str]:
    """What is wrong with the parameters: one is not taken by its name, or stands elsewhere, or one more is needed."""
    own = [p for p in inspect.signature(getattr(thing, "__func__", thing)).parameters.values() if p.name != "self"]
    if isinstance(thing, classmethod):
        own = own[1:]
    takes_all = {p.kind for p in own}
    names = [p.name for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    plain = [name for name in wanted if not name.startswith("*")]
    wrong = [name for name in plain if name not in names and inspect.Parameter.VAR_KEYWORD not in takes_all]
    known = [name for name in plain if name in names]
    if known != sorted(known, key=names.index):
        wrong.append(f"order {names}")
    if "**kwargs" in wanted:  # of an abstract method, whose overrides say more
        return wrong
    named_ones = (p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return wrong + [p.name for p in named_ones if p.default is p.empty and p.name not in {*wanted, *extra}]


def test_all_names_are_there_and_take_what_they_should() -> None:
    pytest.importorskip("fastapi")
    assert len(ROWS) > 140
    wrong = []
    for row in ROWS:
        thing, parameters = found(row), row["parameters"]
        if parameters.startswith("= "):
            is_right = thing is named(parameters[2:])
        elif row["kind"] == "enum":
            is_right = {f"{one.name}={one.value}" for one in thing} == set(parameters.split(", "))
        else:
            is_right = is_kind(thing, row["kind"])
        if not is_right:
            wrong.append(f"{row['module']}.{row['name']}: not {row['kind']} {parameters}")
        if row["kind"] not in ("enum", "property") and not parameters.startswith("= ") and parameters:
            bad = refused(thing, parameters.split(), HANDED_IN.get(row["name"], []))
            wrong += [f"{row['module']}.{row['name']}: {bad}"] * bool(bad)
    assert not wrong, "\n".join(wrong)
