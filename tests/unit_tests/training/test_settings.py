"""Settings know where their values come from, and are final once frozen."""

from __future__ import annotations

import copy
import logging

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.explain import explain, explain_and_exit_if_asked, format_args
from megatron.training.settings import (
    ConfigurationError,
    Settings,
    Source,
    configuration_errors_end_the_program,
)
from tests.unit_tests.training.settings_for_tests import SMALL_GPT, parsed, validated


def test_sources_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    args = parsed("--tensor-model-parallel-size 2 --persistent-save-interval 5 --disable-bias-linear")
    validate_args(args, {"data_cache_path": "/cache", "seq_length": 7})
    sources = {
        "num_layers": "flag --num-layers",
        "save_interval": "flag --persistent-save-interval",
        "add_bias_linear": "flag --disable-bias-linear",
        "hidden_dropout": "default",
        "world_size": "environment variable WORLD_SIZE",
        "rank": "environment variable RANK",
        "data_parallel_size": "derived by derive_data_parallel_size",
        "ffn_hidden_size": "derived by derive_ffn_hidden_size",
        "data_cache_path": "default of this program",
        "seq_length": "flag --seq-length",
    }
    assert {name: str(args.source(name)) for name in sources} == sources
    assert (args.world_size, args.data_parallel_size, args.rank) == (4, 2, 3)


def test_a_flag_at_its_default_counts_as_given() -> None:
    assert parsed("--hidden-dropout 0.1").source("hidden_dropout").given
    assert not parsed().source("hidden_dropout").given


def test_program_default_yields_to_a_flag_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        args = validated(tokenizer_type="GPT2BPETokenizer")
    assert args.tokenizer_type == "NullTokenizer"
    assert "--tokenizer-type is 'NullTokenizer' instead of this program's default" in caplog.text


def test_frozen_settings_refuse_assignment() -> None:
    args = validated().freeze()
    with pytest.raises(AttributeError, match=r"args\.lr is final \(0\.001, flag --lr\)"):
        args.lr = 1.0
    with pytest.raises(AttributeError, match="training state"):
        args.iteration = 1
    with pytest.raises(AttributeError, match="final"):
        del args.lr
    assert args.lr == 1e-3 and args.frozen


def test_variant_of_frozen_settings_is_free() -> None:
    args = validated().freeze()
    other = args.variant(lr=2.0)
    other.hidden_size = 32
    assert (other.lr, args.lr, args.hidden_size) == (2.0, 1e-3, 64)
    assert str(other.source("num_layers")) == "flag --num-layers"


def test_settings_copy_with_their_sources() -> None:
    args = validated().freeze()
    twin = copy.deepcopy(args)
    assert vars(twin) == vars(args)
    assert twin.source("num_layers") == args.source("num_layers")


def test_bookkeeping_is_no_setting() -> None:
    args = validated()
    assert not {name for name in vars(args) if name.startswith("_")}
    assert vars(args.plain()) == vars(args)


def test_parser_defaults_are_not_shared() -> None:
    parse_args(argv=SMALL_GPT.split()).iterations_to_skip.append(3)
    assert parse_args(argv=SMALL_GPT.split()).iterations_to_skip == []


def test_explanation_names_value_source_and_default() -> None:
    args = validated("--bf16 --lr 0.5")
    rows = {line.split()[0]: line for line in explain(args).splitlines()[2:]}
    assert "flag --lr" in rows["lr"] and " 0.5 " in rows["lr"]
    assert "bf16" in rows["params_dtype"] and "derived by derive_params_dtype" in rows["params_dtype"]
    assert rows["transformer_impl"].split()[-1] == "transformer_engine"
    assert "hidden_dropout" not in rows and "main_grads_dtype" not in rows


def test_explain_config_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        explain_and_exit_if_asked(validated("--explain-config"))
    assert stop.value.code == 0
    assert "derived by derive_kv_channels" in capsys.readouterr().out
    explain_and_exit_if_asked(validated())  # not asked: goes on


def test_dump_of_all_arguments() -> None:
    lines = format_args(Settings(beta=1, Alpha=[2])).splitlines()
    assert lines[0] == "------------------------ arguments ------------------------"
    assert lines[1:3] == ["  Alpha " + "." * 43 + " [2]", "  beta " + "." * 44 + " 1"]
    assert lines[3] == "-------------------- end of arguments ---------------------"


def test_refusal_ends_the_program_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop, configuration_errors_end_the_program():
        raise ConfigurationError("--lr (1) is odd")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: --lr (1) is odd\n")


def test_only_the_first_rank_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), configuration_errors_end_the_program():
        raise ConfigurationError("--lr (1) is odd")
    assert capsys.readouterr().err == ""


def test_source_of_a_rule_is_not_given() -> None:
    assert not Source("rule", "derive_x").given
    assert Source("yaml", "x.yaml").given
