"""What is not built yet: setting such a flag is refused. A row goes when its capability arrives."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from typing import Any

from megatron.core.not_built import FIELDS_NOT_BUILT
from megatron.training.config.flags import Flag, all_flags
from megatron.training.settings import ConfigurationError, source_of, was_given

Used = Callable[[Any], bool]

GROUPS_NOT_BUILT: dict[str, str] = {
    "heterogeneous architecture": "heterogeneous layers",
    "vision": "vision models",
    "retro": "training with retrieval",
    "inference": "this way of generating; docs/inference.md says what there is",
    "rerun engine": "detection of faulty results",
    "config logger": "dumping of configuration objects",
    "pretrain_gpt.py when modelopt installed: modelopt-generic": "quantization and distillation",
    "pretrain_vlm.py: vision language model specific arguments": "vision-language models",
}
"""Whole headings of --help that wait for their capability."""

ARGUMENTS_OF_SERVER = (
    "inference_max_batch_size",
    "inference_max_seq_length",
    "inference_dynamic_batching",
    "inference_dynamic_batching_buffer_size_gb",
    "inference_dynamic_batching_chunk_size",
    "inference_dynamic_batching_buffer_guaranteed_fraction",
    "inference_dynamic_batching_buffer_overflow_factor",
    "inference_dynamic_batching_max_requests_override",
    "inference_dynamic_batching_max_tokens_override",
)

ARGUMENTS_OF_TOOLS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(ARGUMENTS_OF_SERVER, ("serves_texts", "tools/run_text_generation_server.py")),
    "output_bert_embeddings": ("embeds_texts", "tools/embed_texts.py"),
}
"""Argument -> (what the only program that reads it sets, this program): others refuse it."""

BUILT_WITHIN_GROUPS = ARGUMENTS_OF_TOOLS.keys() | {
    "qk_layernorm",
    "qk_l2_norm",
    "data_sharding",
    "enable_cuda_graph",
    "cuda_graph_warmup_steps",
}
"""What works although it stands under such a heading."""

ARGUMENTS_NOT_BUILT: dict[str, str] = {
    "result_rejected_tracker_filename": "detection of faulty results",
    "tp_comm_overlap_cfg": "tuning of the vendor's user buffers; the overlap here has none",
    "gradient_reduce_div_fusion": "fully sharded data parallelism other than torch's",
    "suggested_communication_unit_size": "fully sharded data parallelism other than torch's",
    "keep_fp8_transpose_cache_when_using_custom_fsdp": "fully sharded data parallelism other than torch's",
    "load_model_opt_format": "quantization and distillation",
    "enable_experimental": "experimental functions",
    # Without documentation in --help, but ignoring them would change the model or its layout.
    "use_legacy_models": "the older model classes",
    "vision_pretraining": "vision models",
    "kitchen_config_file": "custom quantization recipes",
    "kitchen_recipe_number": "custom quantization recipes",
}
"""Single arguments, in use as soon as they differ from their default."""

ARGUMENTS_OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "bert_binary_head": ("bert", "ict", "retrieval"),
    "mask_prob": ("bert", "t5"),
    "short_seq_prob": ("bert", "t5"),
    "decoder_num_layers": ("t5",),
    "decoder_seq_length": ("t5",),
    "relative_attention_num_buckets": ("t5",),
    "relative_attention_max_distance": ("t5",),
    "encoder_tensor_model_parallel_size": ("t5",),
    "encoder_pipeline_model_parallel_size": ("t5",),
    "pipeline_model_parallel_split_rank": ("t5",),
    "hybrid_attention_ratio": ("mamba",),
    "hybrid_mlp_ratio": ("mamba",),
    "hybrid_override_pattern": ("mamba",),
    "is_hybrid_model": ("mamba",),
    "mamba_state_dim": ("mamba",),
    "mamba_head_dim": ("mamba",),
    "mamba_num_groups": ("mamba",),
    "mamba_num_heads": ("mamba",),
    "disable_mamba_mem_eff_path": ("mamba",),
    "sft": ("gpt",),
    "moe_use_upcycling": ("gpt",),
    "full_validation": ("gpt", "mamba"),
    "multiple_validation_sets": ("gpt", "mamba"),
    "ict_head_size": ("ict", "retrieval"),
    "biencoder_projection_dim": ("ict", "retrieval"),
    "biencoder_shared_query_context_model": ("ict", "retrieval"),
    "titles_data_path": ("ict", "retrieval"),
    "use_one_sent_docs": ("ict", "retrieval"),
    "bert_load": ("ict",),
    "query_in_block_prob": ("ict",),
    "retriever_report_topk_accuracies": ("ict", "retrieval"),
    "retriever_score_scaling": ("ict",),
    "ict_load": ("retrieval",),
    "block_data_path": ("retrieval",),
    "embedding_path": ("retrieval",),
    "evidence_data_path": ("retrieval",),
    "retriever_seq_length": ("retrieval",),
    "sample_rate": ("retrieval",),
    "indexer_batch_size": ("retrieval",),
    "indexer_log_interval": ("retrieval",),
}
"""Arguments that only the programs of some model families read; others refuse them."""

_PROGRAMS = {"retrieval": "tools/create_doc_index.py"}
"""Of families whose program is not `pretrain_FAMILY.py`."""

VALUES_NOT_BUILT: dict[str, tuple[Used, str]] = {
    "position_embedding_type": (lambda value: value == "mrope", "this kind of positions"),
    "cross_entropy_fusion_impl": (lambda value: value == "te", "Transformer Engine's loss"),
    "async_strategy": (lambda value: value == "nvrx", "the package nvidia_resiliency_ext; use mcore or thread"),
    "ckpt_format": (lambda value: value in ("zarr", "torch_dcp"), "this checkpoint format"),
    "ckpt_convert_format": (lambda value: value == "zarr", "this checkpoint format"),
    "moe_token_dispatcher_type": (lambda value: value == "flex", "the kernels of DeepEP; use alltoall"),
}
"""Arguments of which only some values wait."""

WHEN_GIVEN_NOT_BUILT: dict[str, tuple[Used, str]] = {
    "transformer_impl": (
        lambda value: value == "transformer_engine",
        "Transformer Engine; use --transformer-impl local",
    ),
}
"""Arguments whose default waits too: refused only where somebody asked for it."""


@cache
def capabilities_not_built() -> dict[str, tuple[Used, str]]:
    """Argument -> (whether a value of it is in use, the capability that it waits for)."""
    rows: dict[str, tuple[Used, str]] = {}
    for flag in all_flags().values():
        capability = (
            ARGUMENTS_NOT_BUILT.get(flag.dest)
            or (FIELDS_NOT_BUILT.get(flag.field) if flag.dest not in _SETTLED_BY_RULES else None)
            or (GROUPS_NOT_BUILT.get(flag.group) if flag.dest not in BUILT_WITHIN_GROUPS else None)
        )
        if capability is not None and flag.dest not in WHEN_GIVEN_NOT_BUILT:
            rows[flag.dest] = (_differs_from(flag), capability)
    return rows | VALUES_NOT_BUILT


_SETTLED_BY_RULES = frozenset({"overlap_p2p_comm", "use_custom_fsdp", "data_parallel_sharding_strategy"})
"""Fields that the library does not have, and programs may be given: a rule puts what does the same in their place."""


def refuse_capabilities_not_built(args: argparse.Namespace) -> None:
    """Setting what does not exist yet stops the program; all such flags are named at once."""
    found = [
        _refusal(dest, getattr(args, dest), capability)
        for dest, (used, capability) in capabilities_not_built().items()
        if hasattr(args, dest) and used(getattr(args, dest)) and source_of(args, dest).kind != "rule"
    ]
    found += [
        _refusal(dest, getattr(args, dest), capability)
        for dest, (used, capability) in WHEN_GIVEN_NOT_BUILT.items()
        if hasattr(args, dest) and was_given(args, dest) and used(getattr(args, dest))
    ]
    found += _of_other_families(args) + _of_tools(args)
    if found:
        raise ConfigurationError("\n".join(["these settings cannot be used yet; leave them out:", *found]))


def _of_other_families(args: argparse.Namespace) -> list[str]:
    family = getattr(args, "model_family", None) or "gpt"
    return [
        f"  {all_flags()[dest].names[0]}: only {' and '.join(map(program_of, families))} reads it"
        for dest, families in ARGUMENTS_OF_FAMILIES.items()
        if family not in families and getattr(args, dest, all_flags()[dest].default) != all_flags()[dest].default
    ]


def _of_tools(args: argparse.Namespace) -> list[str]:
    return [
        f"  {all_flags()[dest].names[0]}: only {program} reads it"
        for dest, (mark, program) in sorted(ARGUMENTS_OF_TOOLS.items())
        if not getattr(args, mark, False)
        and getattr(args, dest, all_flags()[dest].default) != all_flags()[dest].default
    ]


def program_of(family: str) -> str:
    """The program that makes models of a family."""
    return _PROGRAMS.get(family, f"pretrain_{family}.py")


def _refusal(dest: str, value: Any, capability: str) -> str:
    words = [all_flags()[dest].names[0]]
    if not all_flags()[dest].switch:
        words += map(str, value) if isinstance(value, list) else [str(value)]
    return f"  {' '.join(words)}: not built yet ({capability})"


def _differs_from(flag: Flag) -> Used:
    return lambda value: value != flag.default
