"""`--load hf:DIR` and `--save-hf DIR`: a directory of Hugging Face transformers as another view of a run's model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.collective import on_first_rank, rank_and_size, together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy, load_into
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import parse_strict_flag
from megatron.core.export import (
    HFFolder,
    HFState,
    Joined,
    ModelShape,
    NotExpressible,
    WholeState,
    WholeStateLoadStrategy,
    WithVocabulary,
    family_of_settings,
)
from megatron.core.export.hf_folder import (
    plan_files,
    publish,
    unfinished,
    write_hf_config,
    write_hf_files,
)
from megatron.core.export.loading import keep_absent
from megatron.core.export.sharded_state import ShardedState
from megatron.core.export.whole_state import OF_VOCABULARY
from megatron.training.checkpoint.hf_settings import PREFIX, require_same_settings
from megatron.training.checkpoint.state import load_model, sharded_model
from megatron.training.utils import gather_weights, print_rank_0

# ---- loading ----


def load_hf(args: argparse.Namespace, path: Path, model: list[nn.Module], optimizer: Any | None) -> None:
    """Fill the model from a directory, whatever the layout. All ranks call this.

    Raises:
        CheckpointingException: on every rank, before the model is changed: it is of another model, or damaged.
    """
    print_rank_0(f" loading the model of {path}")
    gather_weights(model)
    with together(f"cannot load {PREFIX}{path}"):
        state = open_hf(args, path)
    strategy = WholeStateLoadStrategy(state)
    request = sharded_model(model, {})
    absent = sorted(
        {name for part in request.values() for name in keep_absent(part, strategy.catalog, state.family.optional)}
    )
    if absent:
        print_rank_0(f"WARNING: {path} lacks {', '.join(absent)}: they keep their initial values")
    contents, _, _ = load_into(
        {},
        request,
        path,
        strategy,
        TorchCommonLoadStrategy(),
        parse_strict_flag(args.dist_ckpt_strictness),
        validate_access_integrity=False,
    )
    load_model(model, contents, strict=True)
    if optimizer is not None:
        optimizer.reload_model_params()
    print_rank_0(f"  successfully loaded the weights of {path}")


def open_hf(args: argparse.Namespace, path: Path) -> HFState:
    """The directory's model under our names; raises if it is another one than the run's."""
    folder = HFFolder(path)
    try:
        settings, family = folder.settings(), folder.family
    except NotExpressible as error:
        raise CheckpointingException(str(error)) from error
    ours = getattr(args, "model_family", None) or "gpt"
    if family.our_type != ours:
        raise CheckpointingException(f"a {family.model_type} model is trained by pretrain_{family.our_type}.py")
    require_same_settings(vars(args), settings, path)
    return HFState(folder, ModelShape.of_settings(vars(args)), family)


# ---- saving ----


def save_hf(args: argparse.Namespace, model: list[nn.Module], tokenizer: Any = None) -> None:
    """Write `--save-hf`, whole or not at all. All ranks call this.

    The shards go into a temporary sharded checkpoint beside the directory, from which the ranks write the files
    tensor by tensor: no rank holds more than one whole parameter, whatever the layout.
    """
    final = Path(args.save_hf)
    print_rank_0(f"saving the model to {final} for transformers")
    gather_weights(model)
    task = f"cannot write {final}"
    written = on_first_rank(task, lambda: unfinished(final))
    try:
        shards = on_first_rank(task, lambda: _new_folder(written / "shards"))
        dist_checkpointing.save(sharded_model(model, {}), shards, _save_strategy())
        write_hf_share(args, Joined(ShardedState(shards)), written, tokenizer)
        on_first_rank(task, lambda: shutil.rmtree(shards))
        on_first_rank(task, lambda: publish(written, final))
    except Exception:
        on_first_rank(task, lambda: shutil.rmtree(written, ignore_errors=True))
        raise
    print_rank_0(f"  successfully saved the model to {final}")


def _new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def _save_strategy() -> Any:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("safetensors"), group)


def write_hf_share(args: argparse.Namespace, state: WholeState, directory: Path, tokenizer: Any) -> None:
    """Write this rank's share of the files. All ranks call this."""
    rank, size = rank_and_size()
    with together(f"cannot write {directory}"):
        family = family_of_settings(vars(args), args.hf_model_type)
        rows = args.hf_vocab_size or getattr(tokenizer, "vocab_size", None) or state.meta(OF_VOCABULARY[0]).size(0)
        trimmed = WithVocabulary(state, rows)
        files = plan_files(trimmed, family.weights(ModelShape.of_settings(vars(args))))
        write_hf_files(directory, trimmed, files[rank::size])
        if rank == 0:
            folder = Path(args.tokenizer_model) if args.tokenizer_type == "HuggingFaceTokenizer" else None
            config = {**family.config(vars(args), rows), **special_tokens(tokenizer)}
            write_hf_config(directory, config, files, folder if folder and folder.is_dir() else None)


def special_tokens(tokenizer: Any) -> dict[str, int | None]:
    """Ids for config.json; None where the tokenizer has no such token."""
    ids: dict[str, int | None] = {}
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eod"), ("pad_token_id", "pad")):
        try:
            value = getattr(tokenizer, name)
        except (AttributeError, NotImplementedError, ValueError):
            value = None
        ids[key] = value if isinstance(value, int) and value >= 0 else None
    return ids
