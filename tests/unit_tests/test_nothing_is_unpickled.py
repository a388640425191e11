"""No line of the repository loads a pickle that could run code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron", "tools", "tasks", "examples", "benchmarks", "tests", "requirements")
RESTRICTED_READERS = {
    "megatron/core/dist_checkpointing/dcp_metadata.py",
    "megatron/core/dist_checkpointing/strategies/archive.py",
}
"""Files that may subclass `pickle.Unpickler`: there only listed names exist."""
LOADERS = {"load", "loads", "Unpickler"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def source_files() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.py")


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_constant(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def offences(text: str, name: str = "x.py") -> list[str]:
    """What a source file does that could run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.ImportFrom(module=origin, names=names) if origin in PICKLES:
                found += [f"from {origin} import {n.name}" for n in names if n.name in LOADERS]
            case ast.Call(func=func):
                called = dotted(func)
                module, _, function = called.rpartition(".")
                if module in PICKLES and function in LOADERS:
                    found.append(called)
                if function == "load" and module == "torch" and not is_constant(node, "weights_only", True):
                    found.append("torch.load without weights_only=True")
                if any(k.arg == "allow_pickle" for k in node.keywords) and not is_constant(node, "allow_pickle", False):
                    found.append(f"{called} with allow_pickle")
                if function == "read_pickle":
                    found.append(called)
            case ast.ClassDef(bases=bases) if name not in RESTRICTED_READERS:
                found += [f"class of {dotted(b)}" for b in bases if dotted(b).endswith("Unpickler")]
    return found


def test_no_file_loads_a_pickle() -> None:
    files = {str(path.relative_to(ROOT)): path for path in source_files()}
    assert len(files) > 300 and set(files) >= RESTRICTED_READERS
    found = {name: offences(path.read_text(encoding="utf-8"), name) for name, path in files.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle\npickle.load(f)",
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "import dill\ndill.load(f)",
        "pd.read_pickle(f)",
        "import pickle\nclass Mine(pickle.Unpickler): pass",
    ],
)
def test_each_way_to_do_so_is_noticed(line: str) -> None:
    assert offences(line) != []


def test_harmless_lines_are_not() -> None:
    assert offences("json.load(f); torch.load(f, weights_only=True); np.load(f, allow_pickle=False)") == []
