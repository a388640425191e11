"""Exit 0 when the running interpreter has what an extra of this checkout needs, in the pinned versions.

Usage: python requirements/satisfied.py EXTRA      (run from the repository root; needs no network)

Walks the requirements in pyproject.toml and, through installed metadata, those of every package found, and
compares each version with requirements/constraints.txt. The first thing missing is named on standard output.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

try:  # every virtual environment has pip, and pip carries these two; Python 3.10 has neither of its own
    from pip._vendor.packaging.markers import default_environment
    from pip._vendor.packaging.requirements import Requirement
except ImportError:
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins() -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements/constraints.txt").open())
    pins = [Requirement(line) for line in lines if line]
    return {normalized(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}


def applies(requirement: Requirement, extras: set[str]) -> bool:
    environment = default_environment()
    return requirement.marker is None or any(
        requirement.marker.evaluate({**environment, "extra": extra}) for extra in (extras or {""})
    )


def first_problem(extra: str) -> str | None:
    """What is missing or has another version than the pinned one; None when all is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own, optional = normalized(project["name"]), project["optional-dependencies"]
    pins, seen = read_pins(), set()
    waiting = [Requirement(text) for text in project["dependencies"] + optional[extra]]
    while waiting:
        requirement = waiting.pop()
        name = normalized(requirement.name)
        if name == own:  # an extra that names another extra of ours
            waiting += [Requirement(text) for key in requirement.extras for text in optional[key]]
            continue
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return f"{name} is not installed"
        for wanted in filter(None, (requirement.specifier, pins[name].specifier if name in pins else None)):
            if not wanted.contains(found.version, prereleases=True):
                return f"{name} {found.version} is installed, {name}{wanted} is wanted"
        children = map(Requirement, found.requires or [])
        waiting += [child for child in children if applies(child, requirement.extras)]
    return installed_from_elsewhere(own)


def installed_from_elsewhere(own: str) -> str | None:
    try:
        origin = metadata.distribution(own).read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        return f"{own} is not installed"
    return None if ROOT.as_uri() in origin else f"{own} is installed, but not from {ROOT}"


if __name__ == "__main__":
    problem = first_problem(sys.argv[1])
    if problem:
        print(problem)
        raise SystemExit(1)
