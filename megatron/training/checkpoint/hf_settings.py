"""What `--load hf:DIR` means for the settings: a directory of Hugging Face transformers says what its model is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export import HFFolder, NotExpressible
from megatron.core.export.family import same_value
from megatron.core.export.hf_folder import TOKENIZER_FILES
from megatron.training.config.flags import in_terms_of_flags
from megatron.training.settings import ConfigurationError, Settings, Source, was_given
from megatron.training.tokenizer import vocab_size_with_padding

PREFIX = "hf:"


def hf_directory(folder: Any) -> Path | None:
    """The directory that `hf:DIR` names; None for anything else."""
    text = "" if folder is None else str(folder)
    return Path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None


def take_hf_settings(args: Settings, path: Path) -> None:
    """Set what config.json says about the model, before the settings are checked.

    What the user has given stays where it decides nothing about the meaning of the weights (lengths, dropout, the
    tokenizer).

    Raises:
        ConfigurationError: the directory has no model that can be built, or a given setting contradicts it.
    """
    try:
        folder = HFFolder(path)
        family, settings = folder.family, folder.settings()
    except (CheckpointingException, NotExpressible) as error:
        raise ConfigurationError(f"cannot load {PREFIX}{path}: {error}") from error
    source = Source("checkpoint", f"{PREFIX}{path}")
    found = {name: getattr(args, name) for name in settings if hasattr(args, name) and was_given(args, name)}
    require_same_settings(found, {name: settings[name] for name in found}, path)
    for name, value in settings.items():
        if not same_value(getattr(args, name, None), value):
            args.put(name, value, source)
    tokenizer = tokenizer_of(path)
    for name, value in {**family.suggestions(folder.config), **tokenizer}.items():
        if name not in settings and not was_given(args, name):
            args.put(name, value, source)
    vocabulary = int(folder.config["vocab_size"])
    padded = vocab_size_with_padding(vocabulary, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    args.put("hf_vocab_size", vocabulary, source)
    args.put("padded_vocab_size", padded, source)


def tokenizer_of(path: Path) -> dict[str, Any]:
    """Settings of the tokenizer that lies beside the model, if there is one."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return {}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(path)}


def require_same_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise `ConfigurationError` with all settings that contradict a config.json."""
    other = [
        f"{in_terms_of_flags(name)} is {found.get(name)!r} here and {value!r} there"
        for name, value in wanted.items()
        if not same_value(found.get(name), value)
    ]
    if other:
        raise ConfigurationError(f"this run's model is not the one of {path}: {'; '.join(other)}")
