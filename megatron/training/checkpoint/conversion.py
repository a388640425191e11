"""From any kind of checkpoint of a model's weights to any other, parameter by parameter in one process.

A `Source` is a model as whole tensors with the settings that say what it is; a saver writes one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export import HFFolder, HFState, Joined, ModelShape, WholeState, WithVocabulary, family_of_settings
from megatron.core.export.hf_folder import write_hf_folder
from megatron.core.export.legacy import nest, to_legacy_name
from megatron.core.export.meta_llama import MetaState
from megatron.core.export.rank_files import RankFilesState, RankSizes, write_rank_files
from megatron.core.export.sharded_files import write_sharded_files
from megatron.core.export.sharded_state import ShardedState
from megatron.core.export.whole_state import OF_VOCABULARY, Cast, Naming
from megatron.training.arguments import parse_args
from megatron.training.checkpoint.find import SHARDED_FORMATS
from megatron.training.checkpoint.hf_settings import tokenizer_of
from megatron.training.checkpoint.paths import (
    begin_checkpoint,
    checkpoint_exists,
    complete_directory,
    detect_format,
    discard_checkpoint,
    get_checkpoint_tracker_filename,
    publish_checkpoint,
    read_tracker,
)
from megatron.training.checkpoint.state import CHECKPOINT_VERSION, plain_value
from megatron.training.tokenizer import vocab_size_with_padding

Progress = Callable[[int], None]
BLOCKS = {"gpt": "decoder", "bert": "encoder", "t5": "decoder", "mamba": "decoder"}
"""Where the layers of each kind of model stand; of a T5 the last ones."""


@dataclass(frozen=True)
class Source:
    """A model that can be read parameter by parameter."""

    state: WholeState
    settings: dict[str, Any]
    """Under the names of the programs' flags."""
    iteration: int
    words: int | None = None
    """Size of the vocabulary without padding, if it is known."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files."""

    @property
    def shape(self) -> ModelShape:
        """What decides which parameters there are."""
        return ModelShape.of_settings(self.settings)

    @property
    def num_bytes(self) -> int:
        """Size of all parameters."""
        return sum(meta.numel() * meta.element_size() for meta in map(self.state.meta, self.state))


@cache
def _defaults() -> dict[str, Any]:
    return dict(vars(parse_args(argv=[])))


def complete_settings(saved: Mapping[str, Any], family: str) -> dict[str, Any]:
    """`saved` with the defaults of what it does not speak of."""
    return {**_defaults(), **{k: v for k, v in saved.items() if v is not None}, "model_family": family}


# --- loaders --------------------------------------------------------------------------------------------


def find_directory(folder: str | Path) -> Path:
    """The checkpoint that a folder's tracker names, or the folder itself if it is one.

    Raises:
        CheckpointingException: neither.
    """
    if checkpoint_exists(folder):
        return complete_directory(folder, *read_tracker(get_checkpoint_tracker_filename(folder)))
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointingException(f"there is no folder {folder}")
    detect_format(path)
    return path


def load_own(folder: str | Path, family: str) -> Source:
    """A checkpoint of this program or of Megatron-LM, of any format, layout and age.

    Raises:
        CheckpointingException: there is none, or it is damaged, or of another kind of model.
    """
    from megatron.core import dist_checkpointing

    directory = find_directory(folder)
    state: WholeState
    if detect_format(directory) in SHARDED_FORMATS:
        common = dist_checkpointing.load_common_state_dict(directory)
        state = Joined(ShardedState(directory))
    else:
        state = RankFilesState(directory, BLOCKS[family])
        common = state.common
    saved = common.get("args")
    if not isinstance(saved, argparse.Namespace):
        raise CheckpointingException(f"{directory} does not say which arguments it was made with")
    settings = complete_settings(vars(saved), family)
    if family == "bert":
        settings["bert_binary_head"] = "embedding.tokentype_embeddings.weight" in state
    norm = "final_norm" if family == "mamba" else "final_layernorm"
    if f"{BLOCKS[family]}.{norm}.weight" not in state:
        raise CheckpointingException(f"{directory} is no checkpoint of a {family.upper()}: it has no {BLOCKS[family]}")
    iteration = common.get("iteration", common.get("total_iters", getattr(saved, "iteration", 0) or 0))
    return Source(state, settings, iteration, settings.get("hf_vocab_size"))


def load_hf(folder: str | Path, family: str) -> Source:
    """A directory of transformers.

    Raises:
        CheckpointingException: it has no model, or is damaged.
        NotExpressible: the model computes something that ours does not.
    """
    directory = HFFolder(folder)
    theirs = directory.family
    if theirs.our_type != family:
        raise CheckpointingException(f"{folder} holds a {theirs.model_type}, which is no {family.upper()}")
    settings = {**theirs.suggestions(directory.config), **directory.settings(), **tokenizer_of(Path(folder))}
    words = int(directory.config["vocab_size"])
    complete = {**complete_settings(settings, family), "hf_vocab_size": words}
    has_tokenizer = "tokenizer_model" in settings
    return Source(HFState(directory), complete, 1, words, Path(folder) if has_tokenizer else None)


def load_meta(folder: str | Path, family: str) -> Source:
    """A Llama as Meta publishes it."""
    state = MetaState(folder)
    words = state.meta(OF_VOCABULARY[0]).size(0)
    settings = {"seq_length": 4096, "max_position_embeddings": 4096, **state.settings, "hf_vocab_size": words}
    return Source(state, complete_settings(settings, family), 1, words)


def in_type(source: Source, dtype: torch.dtype | None) -> Source:
    """With floating-point numbers of another type, which the settings then say."""
    if dtype is None:
        return source
    types = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "params_dtype": dtype}
    return replace(source, state=Cast(source.state, dtype), settings={**source.settings, **types})


# --- savers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Where and for which layout to write."""

    folder: Path
    sizes: RankSizes = RankSizes()
    divisible_by: int = 128
    """The padded vocabulary is a multiple of this, times the tensor parallel size."""
    format: str = "torch"
    fused_norms: bool = False
    """Name norms as the layers of Transformer Engine do."""
    on_progress: Progress = field(default=lambda num_bytes: None)


def padded(source: Source, target: Target) -> Source:
    """With the vocabulary's rows that the layout needs: cut to, or the last one repeated up to them."""
    words = source.words or source.state.meta(OF_VOCABULARY[0]).size(0)
    rows = vocab_size_with_padding(words, target.divisible_by if source.words else 1, target.sizes.tensor)
    settings = {**source.settings, "padded_vocab_size": rows, "make_vocab_size_divisible_by": target.divisible_by}
    return replace(source, state=WithVocabulary(source.state, rows), settings=settings)


SAMPLE_COUNTERS = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
"""Where a run that goes on from the iteration goes on in its data."""


def common_state(source: Source, target: Target) -> dict[str, Any]:
    """What a checkpoint has beside parameters: no optimizer, no random numbers."""
    sizes = target.sizes
    layout = {
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": None,
        **({"moe_grouped_gemm": False} if target.format == "torch" else {}),
        "context_parallel_size": 1,
        "world_size": sizes.tensor * sizes.pipeline * sizes.expert,
        "ckpt_format": target.format,
        "no_save_optim": True,
        "no_save_rng": True,
        "iteration": source.iteration,
        **{name: source.settings.get(name) or 0 if source.iteration else 0 for name in SAMPLE_COUNTERS},
    }
    values = {name: plain_value(value) for name, value in {**source.settings, **layout}.items()}
    return {
        "args": argparse.Namespace(**values),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": source.iteration,
        "num_floating_point_operations_so_far": 0.0,
    }


def save_own(source: Source, target: Target, legacy: bool = False) -> Path:
    """Write a checkpoint for a layout and make it the latest of its folder; its directory."""
    source = padded(source, target)
    require_layout(source, target.sizes)
    if source.settings["model_family"] == "t5" and target.format == "torch" and target.sizes.pipeline > 1:
        raise CheckpointingException("stages of a T5 fit --ckpt-format torch_dist or safetensors, of any layout")
    if legacy and source.settings["model_family"] == "t5":
        raise CheckpointingException("the older classes have no T5 of version 1.1: use --saver core")
    if legacy and source.shape.num_experts:
        raise CheckpointingException("the older classes have no mixtures of experts: use --saver core")
    common = common_state(source, target)
    directory = begin_checkpoint(target.folder, source.iteration)
    try:
        if target.format == "torch":
            arrange, copy = _ARRANGEMENTS["legacy" if legacy else "fused" if target.fused_norms else "plain"]
            sizes, progress = target.sizes, target.on_progress
            write_rank_files(directory, source.state, source.shape, sizes, common, arrange, progress, copy)
        else:
            content = {**common, "content_metadata": {}}
            write_sharded_files(directory, source.state, content, target.format, target.on_progress)
        return publish_checkpoint(directory, source.iteration)
    except BaseException:
        discard_checkpoint(directory)
        raise


def require_layout(source: Source, sizes: RankSizes) -> None:
    """Raise `CheckpointingException` unless the heads, layers and experts divide over the layout."""
    shape = source.shape
    if sizes.expert > 1 and not shape.num_experts:
        raise CheckpointingException(f"--target-expert-parallel-size {sizes.expert}: the model has no experts")
    for size, what, ranks in (
        (shape.num_query_groups, "query groups", sizes.tensor),
        (shape.num_attention_heads, "attention heads", sizes.tensor),
        (shape.num_layers, "layers", sizes.pipeline),
        (shape.num_experts or 0, "experts", sizes.expert),
    ):
        if size % ranks:
            raise CheckpointingException(f"{size} {what} cannot be divided over {ranks} ranks")


def save_hf(source: Source, target: Target, model_type: str | None = None) -> Path:
    """Write a directory of transformers."""
    family = family_of_settings(source.settings, model_type)
    words = source.words or source.state.meta(OF_VOCABULARY[0]).size(0)
    state = WithVocabulary(source.state, words)
    config = family.config(source.settings, words)
    write_hf_folder(target.folder, state, family, source.shape, config, source.tokenizer, target.on_progress)
    return target.folder


def _fused(model: dict[str, Tensor]) -> dict[str, Any]:
    naming = Naming.of(model)
    return {naming.sharded_name(name): tensor for name, tensor in model.items()}


_HEAD_COPY = "word_embeddings_for_head.weight"


def _legacy(model: dict[str, Tensor]) -> dict[str, Any]:
    return nest({name if name == _HEAD_COPY else to_legacy_name(name): tensor for name, tensor in model.items()})


_ARRANGEMENTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "plain": (dict, "output_layer.weight"),
    "fused": (_fused, "output_layer.weight"),
    "legacy": (_legacy, _HEAD_COPY),
}
"""Kind of names -> (what the entry `model` is, name of the tied output weight's copy)."""
