"""What benchmarks take from each other is there: most of them are run by hand only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
FILES = sorted(FOLDER.glob("*.py"))


def defined(path: Path) -> set[str]:
    """Names at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_taken_from_other_benchmarks_exist(path: Path) -> None:
    modules = {file.stem: file for file in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("benchmarks"):
            continue
        wanted = {alias.name for alias in node.names}
        of = node.module.partition(".")[2]
        assert wanted <= (defined(modules[of]) if of else modules.keys()), node.module
