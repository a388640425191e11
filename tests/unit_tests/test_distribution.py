"""What the distribution declares agrees with itself: version, dependencies, pins and their reasons."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron.core import package_info

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "megatron-core"


def direct_requirements() -> list[Requirement]:
    found = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    return [requirement for requirement in found if requirement.name != DISTRIBUTION]


def pins() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements/constraints.txt").open())
    return [Requirement(line) for line in lines if line]


def test_installed_version_is_that_of_the_source() -> None:
    assert metadata.version(DISTRIBUTION) == package_info.__version__


def test_base_install_is_torch_and_numpy() -> None:
    base = {requirement.name for requirement in direct_requirements() if "extra" not in str(requirement.marker or "")}
    assert base == {"torch", "numpy"}


def test_every_direct_dependency_is_pinned_and_explained() -> None:
    pinned = {pin.name for pin in pins()}
    explained = (ROOT / "docs/dependencies.md").read_text()
    for name in {requirement.name for requirement in direct_requirements()}:
        assert name in pinned, f"{name} has no pin in requirements/constraints.txt"
        assert re.search(rf"\b{re.escape(name)}\b", explained), f"{name} has no reason in docs/dependencies.md"


def test_every_pin_is_exact() -> None:
    assert [str(pin) for pin in pins() if [clause.operator for clause in pin.specifier] != ["=="]] == []


def test_every_pin_belongs_to_the_closure_of_our_requirements() -> None:
    """Nothing is pinned that nothing here needs, as far as packages of this interpreter can tell."""
    needed, waiting = set(), direct_requirements()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().name).lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            children = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [Requirement(text) for text in children if "extra ==" not in text]
    needed |= {"requests"}  # opentelemetry-exporter-http-transport[requests], an extra of an indirect dependency
    applicable = {pin.name for pin in pins() if pin.marker is None or pin.marker.evaluate()}
    assert applicable - needed == set()


@pytest.mark.parametrize("module", ["megatron.core", "megatron.training", "megatron.inference"])
def test_import_loads_no_optional_package(module: str) -> None:
    """An optional package is imported when a setting asks for it, never before."""
    optional = (
        "transformers",
        "wandb",
        "tensorboard",
        "matplotlib",
        "transformer_engine",
        "flash_attn",
        "mamba_ssm",
    )
    program = f"import sys, {module}; print([name for name in {optional!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
