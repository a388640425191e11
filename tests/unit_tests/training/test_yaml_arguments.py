"""A YAML file gives the same settings as flags do; flags win over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.settings import ConfigurationError, Settings

FILE = """
language_model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  layernorm_epsilon: 1e-6
  add_bias_linear: false
  activation_func: swiglu
  attention_backend: unfused
  window_size: [7, 0]
model_parallel:
  tensor_model_parallel_size: 1
seq-length: 128
max_position_embeddings: 128
micro_batch_size: 2
tokenizer_type: NullTokenizer
vocab_size: 100
train_iters: 10
lr: 3e-4
mock_data: true
persist_layer_norm: false
save: ${FOLDER}/run
save_interval: 5
"""


def parse(tmp_path: Path, content: str, *flags: str) -> Settings:
    file = tmp_path / "settings.yaml"
    file.write_text(content, encoding="utf-8")
    return parse_args(argv=["--yaml-cfg", str(file), *flags])


def test_file_gives_every_kind_of_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/data")
    args = parse(tmp_path, FILE)
    validate_args(args)
    assert (args.num_layers, args.norm_epsilon, args.add_bias_linear, args.swiglu) == (4, 1e-6, False, True)
    assert (args.lr, args.save, args.window_size) == (3e-4, "/data/run", [7, 0])
    assert (args.attention_backend.name, args.no_persist_layer_norm) == ("unfused", True)
    assert str(args.source("lr")) == f"YAML file {tmp_path / 'settings.yaml'}"


def test_flag_wins_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/data")
    args = parse(tmp_path, FILE, "--num-layers", "2", "--attention-backend", "auto")
    assert (args.num_layers, args.attention_backend.name, args.hidden_size) == (2, "auto", 64)


def test_config_is_another_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("num_layers: 3", encoding="utf-8")
    assert parse_args(argv=["--config", str(file)]).num_layers == 3


@pytest.mark.parametrize(
    "content, message",
    [
        ("num_layer: 3", "unknown key num_layer; did you mean num_layers"),
        ("language_model: {hiden_size: 3}", "unknown key hiden_size; did you mean hidden_size"),
        ("num_layers: many", "num_layers: 'many' cannot be used"),
        ("num_layers: 1.5", "num_layers: '?1.5"),
        ("num_layers: [1, 2]", "is not one value"),
        ("bf16: 3", "bf16: 3 must be true or false"),
        ("normalization: BatchNorm", "'BatchNorm' can be LayerNorm, RMSNorm"),
        ("attention_backend: fast", "'fast' is none of flash"),
        ("activation_func: tanh", "activation_func 'tanh' can be swiglu, squaredrelu, gelu"),
        ("save: ${NO_SUCH_VARIABLE}/x", "environment variable NO_SUCH_VARIABLE in .* is not set"),
        ("num_layers: 3\nlanguage_model: {num_layers: 3}", "num_layers is given twice"),
        ("- 3", "must hold `name: value` lines"),
        ("a: [", "cannot be read"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(tmp_path, content)


def test_missing_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--yaml-cfg /no/such\.yaml cannot be read"):
        parse_args(argv=["--yaml-cfg", "/no/such.yaml"])


def test_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert parse(tmp_path, "").num_layers is None


def test_values_in_a_file_meet_the_rules(tmp_path: Path) -> None:
    args = parse(tmp_path, "use_legacy_models: true")
    with pytest.raises(ConfigurationError, match="--use-legacy-models: not built yet"):
        validate_args(args)
