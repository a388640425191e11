"""The flags are those of the public interface: names, values, defaults, choices, groups."""

from __future__ import annotations

import argparse
import ast
import cProfile
import csv
import pstats
from pathlib import Path

import pytest

from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import add_megatron_arguments, build_parser, moe_freq_type, parse_args
from megatron.training.config import FLAG_GROUPS
from megatron.training.config.flags import MemberOf, all_flags, in_terms_of_flags, layer_pattern
from tests.unit_tests.training.settings_for_tests import SMALL_GPT

FACTS = list(
    csv.DictReader(
        Path(__file__).with_name("flag_facts.tsv").open(encoding="utf-8"),
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    )
)
DOCUMENTED = [fact for fact in FACTS if fact["tier"] in "AB"]
OF_ENCODER_STAGES = {
    "--encoder-tensor-model-parallel-size",
    "--encoder-pipeline-model-parallel-size",
    "--pipeline-model-parallel-split-rank",
}
"""Deprecated elsewhere; here they place the encoder of a T5."""
UNDOCUMENTED = [fact for fact in FACTS if fact["tier"] == "C" and fact["flag"] not in OF_ENCODER_STAGES]
REPLACED = ("batch_size", "warmup", "model_parallel_size", "checkpoint_activations")

ADDED_FLAGS = {
    "--save-keep-last",
    "--save-retain-interval",
    "--async-strategy",
    "--ckpt-verify",
    "--pipeline-schedule",
    "--moe-shared-expert-gate",
    "--window-size",
    "--yarn-rotary-scaling-factor",
    "--yarn-original-max-position-embeddings",
    "--yarn-beta-fast",
    "--yarn-beta-slow",
    "--yarn-mscale",
    "--yarn-mscale-all-dim",
    "--explain-config",
    "--config",
    "--metrics-jsonl",
    "--no-progress-bar",
    "--save-hf",
    "--geglu",
    "--softmax-scale",
    "--hf-model-type",
    "--timeline",
    "--timeline-step",
    "--full-validation",
    "--multiple-validation-sets",
    "--torch-compile",
    "--cpu-offloading",
    "--cpu-offloading-num-layers",
    "--no-cpu-offloading-activations",
    "--cpu-offloading-weights",
    "--muon-momentum",
    "--muon-use-nesterov",
    "--muon-num-ns-steps",
    "--muon-scale-mode",
    "--muon-extra-scale-factor",
}
ADDED_CHOICES = {
    "position_embedding_type": {"yarn"},
    "cross_entropy_fusion_impl": {"linear"},
    "optimizer": {"muon"},
    "ckpt_format": {"safetensors"},
    "ckpt_convert_format": {"safetensors"},
    "moe_router_load_balancing_type": {"global_aux_loss"},
}
ONE_OR_MORE = {"moe_router_load_balancing_type", "moe_aux_loss_coeff"}
"""Take several values too."""


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.fixture(scope="module")
def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


def ids(facts: list[dict[str, str]]) -> list[str]:
    return [fact["dest"] for fact in facts]


@pytest.mark.parametrize("fact", FACTS, ids=ids(FACTS))
def test_flag_is_as_the_interface_says(fact: dict[str, str], actions: dict[str, argparse.Action]) -> None:
    for option in fact["flag"].split("|"):
        assert option in actions, f"{option} is missing"
        assert actions[option].dest == fact["dest"]
    check_shape(fact, actions[fact["flag"].split("|")[0]])
    check_choices(fact, actions[fact["flag"].split("|")[0]])
    check_default(fact, actions[fact["flag"].split("|")[0]])


def check_shape(fact: dict[str, str], action: argparse.Action) -> None:
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    kinds |= {"moe_freq_type": layer_pattern, "no_rope_freq_type": layer_pattern}
    if fact["kind"] == "bool":
        assert action.nargs == 0
    elif fact["kind"] == "list":
        kind, nargs = fact["type"].split(" nargs=")
        assert (action.type, action.nargs) == (kinds[kind], nargs)
    elif fact["type"].startswith("enum:"):
        assert isinstance(action.type, MemberOf)
    else:
        nargs = "+" if fact["dest"] in ONE_OR_MORE else None
        assert (action.type, action.nargs) == (kinds[fact["type"]], nargs)


def check_choices(fact: dict[str, str], action: argparse.Action) -> None:
    expected = {choice for choice in fact["choices"].split(",") if choice not in ("", "None")}
    if isinstance(action.type, MemberOf):
        assert set(action.type.names) == expected
    else:
        found = {str(choice) for choice in action.choices or ()} - {"None"}
        assert found == expected | ADDED_CHOICES.get(fact["dest"], set())


def check_default(fact: dict[str, str], action: argparse.Action) -> None:
    if "(or env" in fact["default"]:
        assert action.default == int(fact["default"].split()[0])
    elif fact["type"].startswith("enum:"):
        assert action.default is AttnBackend[fact["default"]]
    else:
        expected = ast.literal_eval(fact["default"])
        assert action.default == expected
        assert (action.default is None) == (expected is None)


def test_nothing_else_is_a_flag(actions: dict[str, argparse.Action]) -> None:
    public = {option for fact in FACTS for option in fact["flag"].split("|")}
    assert set(actions) - public == ADDED_FLAGS | {"-h", "--help"}


def test_documented_flags_stand_in_help_under_their_group(parser: argparse.ArgumentParser) -> None:
    groups = {
        option: group.title
        for group in parser._action_groups
        for action in group._group_actions
        for option in action.option_strings
    }
    shown = parser.format_help()
    for fact in DOCUMENTED:
        for option in fact["flag"].split("|"):
            assert groups[option] == fact["group"], option
            assert f" {option}" in shown
    for fact in UNDOCUMENTED:
        assert f" {fact['flag']} " not in shown


def test_every_shown_flag_says_what_it_does(parser: argparse.ArgumentParser) -> None:
    parser.format_help()
    for flag in all_flags().values():
        if not flag.hidden:
            assert len(flag.help) > 10, flag.names


def test_a_switch_that_turns_off_says_so() -> None:
    assert all_flags()["add_bias_linear"].help.startswith("Turn off: ")
    assert not all_flags()["swiglu"].help.startswith("Turn off: ")


def test_no_field_is_declared_twice() -> None:
    names = [name for group in FLAG_GROUPS for _, name in group.members()]
    assert len(names) == len(set(names))


def test_any_parser_can_carry_the_flags() -> None:
    parser = add_megatron_arguments(argparse.ArgumentParser())
    assert parser.parse_args(["--num-layers", "3"]).num_layers == 3


def test_programs_add_their_own_flags() -> None:
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument_group("own").add_argument("--own-flag", type=int, default=1)
        return parser

    args = parse_args(add, argv=[*SMALL_GPT.split(), "--own-flag", "5"])
    assert args.own_flag == 5
    assert str(args.source("own_flag")) == "flag --own-flag"


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("--num-layer", "--num-layers"),
        ("--num_layers", "--num-layers"),
        ("--hiden-size=64", "--hidden-size"),
        ("--use-distributed-optimiser", "--use-distributed-optimizer"),
    ],
)
def test_misspelt_flag_stops_with_a_suggestion(misspelt: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(argv=[*SMALL_GPT.split(), misspelt])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"unknown flag {misspelt.split('=')[0]}; did you mean {meant}" in message
    assert len(message) < 300  # the usage of all flags would bury it


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv=[*SMALL_GPT.split(), "--tensor-model-parallel", "2"])
    assert "unknown flag --tensor-model-parallel;" in capsys.readouterr().err


def test_unknown_flags_can_be_left_alone() -> None:
    assert parse_args(ignore_unknown_args=True, argv=[*SMALL_GPT.split(), "--foreign", "1"]).num_layers == 4


@pytest.mark.parametrize(
    "text, pattern",
    [("2", 2), ("[1,0]", [1, 0]), ("([1]+[0]*3)*2", [1, 0, 0, 0, 1, 0, 0, 0]), ("[0]*2+[1]", [0, 0, 1])],
)
def test_layer_pattern(text: str, pattern: object) -> None:
    assert moe_freq_type(text) == pattern


@pytest.mark.parametrize("text", ["[1,0]; x", "[__import__('os')]", "[1", "[[1]]*[2]", "(1)[0]"])
def test_layer_pattern_is_no_code(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(argv=[*SMALL_GPT.split(), "--no-rope-freq", text])
    assert stop.value.code == 2
    assert "--no-rope-freq" in capsys.readouterr().err


def test_messages_speak_of_flags() -> None:
    spoken = in_terms_of_flags("num_moe_experts (3) and layernorm_epsilon fit no unknown_word")
    assert spoken == "--num-experts (3) and --norm-epsilon fit no unknown_word"
    spoken = in_terms_of_flags("num_moe_experts needs add_bias_linear to be off, or apply_rope_fusion to be off")
    assert spoken == "--num-experts needs --disable-bias-linear, or --no-rope-fusion"
    spoken = in_terms_of_flags("it needs sequence_parallel to be off")
    assert spoken == "it needs --sequence-parallel to be off"


def test_parsing_is_fast() -> None:
    """In calls of functions, of which a common machine makes a million a second and more."""
    parse_args(argv=SMALL_GPT.split())
    profile = cProfile.Profile()
    profile.runcall(parse_args, argv=SMALL_GPT.split())
    assert pstats.Stats(profile).total_calls < 200_000
