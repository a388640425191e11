"""The pages promise only what exists: flags, files that links lead to, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.training.arguments import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
PROGRAMS = ("tools", "tasks", "benchmarks")
ELSEWHERE = {
    *("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--standalone"),  # torchrun
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--wrap"),  # sbatch
    *("--no-build-isolation", "--logdir", "--help"),  # pip, tensorboard, all programs
}


def known_flags() -> set[str]:
    """Flags of training, and those that a program under tools/, tasks/ or benchmarks/ adds itself."""
    flags = {name for action in build_parser()._actions for name in action.option_strings}
    tokenizer_flags = ROOT / "megatron/training/tokenizer/flags.py"
    recorder = ROOT / "tests/functional_tests/equivalence/record.py"
    programs = [path for folder in PROGRAMS for path in ROOT.glob(f"{folder}/**/*.py")]
    for program in [*programs, tokenizer_flags, recorder]:
        flags |= set(re.findall(r'"(--[a-z][\w-]*)"', program.read_text()))
    return flags | ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_exist(page: Path) -> None:
    mentioned = re.findall(r"(?<![\w-])--[a-z][\w-]*\*?", page.read_text())
    assert {flag for flag in mentioned if flag[-1] not in "*-"} - known_flags() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_named_in_commands_exist(page: Path) -> None:
    programs = re.findall(r"(?:python|bash|torchrun[^\n]*?) ((?:[\w.]+/)*[\w.]+\.(?:py|sh))\b", page.read_text())
    assert [program for program in programs if not (ROOT / program).exists()] == []
