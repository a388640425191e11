"""The docstrings below the fields of dataclasses: what --help says of a setting."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def field_docs(owner: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and its bases (read from the source, for --help only)."""
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        source = inspect.getsourcefile(base) if base.__module__.startswith("megatron.") else None
        if source is not None:
            docs.update(_docs_in(Path(source)).get(base.__name__, {}))
    return docs


@cache
def _docs_in(source: Path) -> dict[str, dict[str, str]]:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return {node.name: dict(_documented(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:]):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                yield name, " ".join(text.split())
