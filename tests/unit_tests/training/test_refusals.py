"""In which words each rule refuses: the tables under `refusals/`, one for each module of rules."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.rules import RULES, apply_rules, runtime
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training import refusals
from tests.unit_tests.training.refusals.refusal import Refusal
from tests.unit_tests.training.settings_for_tests import SMALL_GPT, validated, varied


def every_refusal() -> list[Refusal]:
    names = sorted(module.name for module in pkgutil.iter_modules(refusals.__path__) if module.name != "refusal")
    return [row for name in names for row in importlib.import_module(f"{refusals.__name__}.{name}").REFUSALS]


@pytest.mark.parametrize("row", every_refusal(), ids=str)
def test_refusal(row: Refusal) -> None:
    if row.values:
        args = varied(**row.values)
        with pytest.raises(ConfigurationError, match=row.message):
            apply_rules(args, (row.rule,))
    else:
        with pytest.raises(ConfigurationError, match=row.message):
            validated(row.flags, world_size=row.world_size, base=row.base)


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match="--torch-compile needs a C.. compiler: no-such-compiler"):
        apply_rules(varied(torch_compile=True), (runtime.require_compiler,))


def test_every_rule_that_refuses_is_tested() -> None:
    tested = {row.rule for row in every_refusal()}
    elsewhere = {
        "refuse_capabilities_not_built",  # test_capabilities.py
        "require_load_for_checkpoint_args",  # test_checkpoint_arguments.py
        "require_what_an_encoder_can_do",  # functional_tests/test_pretrain_bert.py
        "require_positions_of_family",  # functional_tests/test_pretrain_t5.py
        "require_masked_samples",  # test_family_rules.py
        "require_buckets_of_distances",  # test_family_rules.py
        "require_spec",  # functional_tests/test_mamba.py, and so are the next three
        "require_fitting_layers",
        "require_shareable_heads",
        "require_what_a_recurrence_can_do",
        "require_compiler",  # test_compilation_without_a_compiler, which changes the environment
    }
    refusing = {rule for rule in RULES if rule.__name__.startswith(("require_", "refuse_"))}
    assert {rule.__name__ for rule in refusing - tested} == elsewhere


def test_rules_have_reasons_and_names_of_their_own() -> None:
    names = [rule.__name__ for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(rule.__doc__ for rule in RULES)


def test_message_of_the_library_speaks_of_flags() -> None:
    with pytest.raises(ConfigurationError, match=r"--hidden-dropout \(2.0\) must be at least 0 and below 1"):
        validated("--hidden-dropout 2")


@pytest.mark.parametrize(
    "base, message",
    [
        (SMALL_GPT.replace("--train-iters 10", ""), "give --train-iters or --train-samples"),
        (SMALL_GPT.replace("--lr 1e-3", ""), "--lr, the peak learning rate, is required"),
        (SMALL_GPT.replace("--seq-length 128", ""), "--seq-length, the tokens per sample, is required"),
    ],
)
def test_training_needs_a_length_and_a_rate(base: str, message: str) -> None:
    validate_args(parse_args(argv=base.split()))  # fine for a program that does not train
    with pytest.raises(ConfigurationError, match=message):
        validate_args(parse_args(argv=base.split()), for_training=True)
