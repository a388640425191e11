"""A small copy of a training command line: the same layout, a model small enough to be compared on one machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import Any

import torch

from megatron.core.transformer.pipeline_parallel_layer_layout import LETTERS, PipelineParallelLayerLayout
from megatron.training.arguments import parse_args, validate_args
from megatron.training.config.flags import Flag, all_flags
from megatron.training.rules.family import ENCODER_FAMILIES
from megatron.training.settings import ConfigurationError, Settings, Source, refuse_unless
from megatron.training.verify import shrink_hybrid as hybrid

HEAD_WIDTH = 8
"""Channels of a head in the small model: enough for rotary positions on a part of them."""
FEWEST_HEADS = 4
SHORTEST = 32
"""Tokens of a sample, at least."""

LEFT_OUT_GROUPS = frozenset(
    {"checkpointing", "logging", "tokenizer", "validation", "configuration", "rerun engine", "config logger",
     "no effect", "replaced"}
)  # fmt: skip
"""Headings whose flags have no influence on the numbers of a run that starts from scratch on made-up samples."""

LEFT_OUT = frozenset(
    """data_path split train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path
    data_cache_path mmap_bin_files mock_data num_workers num_dataset_builder_threads mid_level_dataset_surplus
    object_storage_cache_path dataloader_type data_sharding
    log_interval exit_interval exit_duration_in_mins exit_signal_handler tensorboard_dir profile profile_step_start
    profile_step_end profile_ranks use_pytorch_profiler record_memory_history memory_snapshot_path manual_gc
    manual_gc_interval manual_gc_eval train_sync_interval check_weight_hash_across_dp_replicas_interval
    iterations_to_skip decrease_batch_size_if_needed deterministic_mode
    train_iters train_samples lr min_lr lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
    lr_warmup_fraction lr_warmup_iters lr_warmup_samples lr_warmup_init decoupled_lr decoupled_min_lr
    override_opt_param_scheduler use_checkpoint_opt_param_scheduler
    adam_eps init_method_std init_method_xavier_uniform attention_dropout hidden_dropout
    distributed_timeout_minutes distributed_backend local_rank spec yaml_cfg
    fp16 bf16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
    accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 fp16_lm_cross_entropy
    """.split()
)
"""Single flags of which the same is true, or that the comparison sets itself."""

OF_A_LAYOUT = frozenset(
    """sequence_parallel recompute_granularity recompute_method recompute_num_layers recompute_modules
    recompute_activations distribute_saved_activations tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_rs
    tp_comm_overlap_rs_dgrad tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_split_ag tp_comm_split_rs
    async_tensor_model_parallel_allreduce cpu_offloading cpu_offloading_num_layers cpu_offloading_activations
    cpu_offloading_weights optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
    overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params use_precision_aware_optimizer
    clone_scatter_output_in_embedding gradient_accumulation_fusion torch_compile
    expert_model_parallel_size expert_tensor_parallel_size moe_token_dispatcher_type moe_grouped_gemm
    moe_layer_recompute
    """.split()
)
"""Besides those under "distributed": flags that the one process goes without."""


@dataclass
class Shrunk:
    """Command lines for the comparison."""

    ranks: int
    words: list[str]
    """Of the layout."""
    reference: list[str]
    """Of the one process."""
    half_precision: torch.dtype | None
    """The type that the user's flags ask for, if not float32; `words` leave it out."""
    uneven: bool
    """Samples should count unlike many tokens."""
    changes: list[str] = field(default_factory=list)
    """What is not as the user gave it, in words."""


def shrink(
    argv: Sequence[str], ranks: int | None, steps: int, args_defaults: Mapping[str, Any] | None = None
) -> Shrunk:
    """Command lines that compare the layout of `argv` on a small model.

    Ratios are kept: queries to a key, feed-forward to hidden size, layers of one stage to those of another (at
    least whether they are equal), window to sequence. Dropout is off, samples and vocabulary are made up, learning
    rate, Adam's epsilon and the initial standard deviation are those with which deviations mean something.

    Args:
        ranks: processes; default the fewest that the model's layout needs.
        args_defaults: the program's values for flags that are not given, the family of its model among them.

    Raises:
        ConfigurationError: the flags cannot be used, or not be verified.
    """
    family = (args_defaults or {}).get("model_family")
    refuse_unless(family not in _NOT_SHRUNK, f"a model of the family {family} {_NOT_SHRUNK.get(family, '')}")
    given = parse_args(argv=list(argv))
    model_ranks = _ranks_of_model(given)
    ranks = ranks or model_ranks
    given.put("world_size", ranks, Source("flag", "--nproc"))
    refuse_unless(
        ranks > 1,
        "these flags are for one process: there is no layout to verify. Give --tensor-model-parallel-size, "
        "--pipeline-model-parallel-size, --context-parallel-size or --expert-model-parallel-size, or --nproc for data "
        "parallel ranks",
    )
    args = parse_args(argv=list(argv))
    args.put("world_size", ranks, Source("flag", "--nproc"))
    for name, value in (_MADE_UP | (_OF_ENCODERS if family in ENCODER_FAMILIES else {})).items():
        args.put(name, value, Source("program"))
    validate_args(args, args_defaults)
    _refuse_what_cannot_be_compared(args)
    numbers = _Numbers(args)
    sized = numbers.words()
    model = [*sized, *_fixed(args, steps, numbers.global_batch), *_kept(given, numbers.replaced, layout=False)]
    layout = [*numbers.layout_words(), *_kept(given, numbers.replaced, layout=True)]
    uneven = bool(args.calculate_per_token_loss)
    # Where a micro-batch's loss depends on more than its samples one by one, the one process has the same ones.
    same_parts = bool(args.num_experts) or (not args.calculate_per_token_loss and args.eod_mask_loss)
    reference_size = numbers.micro_batch if same_parts else 1
    return Shrunk(
        ranks,
        words=[*model, *layout, "--micro-batch-size", str(numbers.micro_batch)],
        reference=[*model, "--micro-batch-size", str(reference_size)],
        half_precision=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        uneven=uneven,
        changes=numbers.changes,
    )


_NOT_SHRUNK = {
    "t5": "has two stacks of layers, which this cannot make small yet; its layouts are compared by "
    "tests/functional_tests/equivalence/encoders.py",
    **dict.fromkeys(("ict", "retrieval"), "reads pairs of texts, which this cannot make up yet"),
}

_OF_ENCODERS = {"mock_data": False, "data_path": ["made-up"]}

_MADE_UP = {
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 1000,
    "mock_data": True,
    "data_path": None,
    "split": "1,0,0",
}
"""Data and vocabulary are not those of the flags: what is wrong with them does not matter here."""


def _ranks_of_model(args: Settings) -> int:
    tp, pp = int(args.tensor_model_parallel_size), int(args.pipeline_model_parallel_size)
    of_experts = int(args.expert_tensor_parallel_size or tp) * int(args.expert_model_parallel_size)
    return math.lcm(tp * int(args.context_parallel_size), of_experts) * pp


def _refuse_what_cannot_be_compared(args: Settings) -> None:
    refuse_unless(
        not args.data_parallel_random_init,
        "--data-parallel-random-init gives every replica other weights: no one process computes the same",
    )
    refuse_unless(
        args.spec is None or args.spec[0] == "local" or args.model_family == "mamba",
        f"--spec {' '.join(args.spec or [])}: layers of your own are verified by a program of your own (--program)",
    )


def _fixed(args: Settings, steps: int, batch: int) -> list[str]:
    """What the comparison sets itself."""
    words = """--lr 1e-2 --min-lr 1e-3 --adam-eps 1e-2 --init-method-std 0.1 --attention-dropout 0 --hidden-dropout 0
        --tokenizer-type NullTokenizer --num-workers 0 --eval-iters 1 --eval-interval 1000000
        --log-interval 1000000 --no-progress-bar""".split()
    words += ["--mock-data"] if args.mock_data else ["--data-path", *args.data_path]
    if args.rampup_batch_size:  # two steps at half the batch, the rest at the whole
        half = batch // 2
        total = 2 * half + max(1, steps - 2) * batch
        words += ["--rampup-batch-size", str(half), str(half), str(2 * half), "--train-samples", str(total)]
    else:
        words += ["--train-iters", str(steps)]
    if args.lr_decay_style == "WSD":
        unit, last = ("samples", batch) if args.rampup_batch_size else ("iters", 1)
        words += [f"--lr-wsd-decay-{unit}", str(last)]
    return [*words, "--global-batch-size", str(batch)]


def _kept(given: Settings, replaced: set[str], *, layout: bool) -> list[str]:
    """The flags that the user gave and that stay as they are: those of the layout, or all others."""
    words: list[str] = []
    for flag in all_flags().values():
        source = given.source(flag.dest)
        if source.kind not in ("flag", "yaml", "environment") or flag.dest in replaced or flag.dest in LEFT_OUT:
            continue
        if flag.group in LEFT_OUT_GROUPS or flag.dest in ("rank", "world_size"):
            continue
        if (flag.group == "distributed" or flag.dest in OF_A_LAYOUT) == layout:
            words += _as_words(flag, getattr(given, flag.dest))
    return words


def _as_words(flag: Flag, value: Any) -> list[str]:
    """What one would type for this value."""
    if flag.switch:
        return [flag.names[0]] if value != flag.default else []
    if value is None:
        return []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [flag.names[0], *(v.name if isinstance(v, Enum) else str(v) for v in values)]


class _Numbers:
    """The sizes of the small model and its batches."""

    def __init__(self, args: Settings) -> None:
        self.args = args
        self.replaced: set[str] = set()
        self.changes: list[str] = []
        self.tp, self.cp = args.tensor_model_parallel_size, args.context_parallel_size
        self.pp, self.vpp = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
        self.dp = args.data_parallel_size
        self.layers, self.placement = self._layers()
        self._set_widths()
        self._set_lengths()
        self._set_batch()

    def words(self) -> list[str]:
        """Sizes of model and samples."""
        words: list[str] = []
        for name, value in self.sizes.items():
            self._change(name, value)
            words += [all_flags()[name].names[0], str(value)]
        for name in ("micro_batch_size", "global_batch_size", "rampup_batch_size"):
            self.replaced.add(name)
        if self.args.model_family == "mamba":
            words += ["--spec", *self.args.spec]
        return words + self._lists()

    def layout_words(self) -> list[str]:
        """Sizes that belong to the layout."""
        words = list(self.placement)
        layers_of_stage = max(1, self.layers // (self.pp * self.vpp))
        for name in ("recompute_num_layers", "cpu_offloading_num_layers"):
            value = getattr(self.args, name)
            if value:
                smaller = min(value, layers_of_stage if name[0] == "r" else self.layers - 1)
                self._change(name, smaller)
                words += [all_flags()[name].names[0], str(smaller)]
        if len(self.args.cp_comm_type or ()) > 1:
            self.replaced.add("cp_comm_type")
            words += ["--cp-comm-type", *self.args.cp_comm_type[: self.layers]]
        if self.args.overlap_grad_reduce:  # several buckets, as in the whole model
            self.replaced |= {"ddp_bucket_size", "ddp_num_buckets"}
            words += ["--ddp-bucket-size", "4000"]
        return words

    def _change(self, name: str, value: Any) -> None:
        self.replaced.add(name)
        before = getattr(self.args, name)
        if name in _MADE_UP:
            self.changes.append(f"{all_flags()[name].names[0]} {value}, random tokens")
        elif before != value and before is not None:
            self.changes.append(f"{all_flags()[name].names[0]} {before} -> {value}")

    # --- depth ---

    def _layers(self) -> tuple[int, list[str]]:
        """(layers, flags that place them)."""
        args, chunks = self.args, self.pp * self.vpp
        if args.pipeline_model_parallel_layout is not None:
            self.replaced.add("pipeline_model_parallel_layout")
            text, layers = _short_layout(args.pipeline_model_parallel_layout, self.pp)
            self.changes.append(f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} -> {text}")
            return layers, ["--pipeline-model-parallel-layout", text]
        if args.num_layers_per_virtual_pipeline_stage is not None:
            self._change("num_layers_per_virtual_pipeline_stage", 1)
            return chunks, ["--num-layers-per-virtual-pipeline-stage", "1"]
        if args.model_family == "mamba":
            return hybrid.num_layers(args, chunks), []
        counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        if counted:
            return 2 * chunks - counted, []
        if (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) != (None, None):
            return self._uneven_layers()
        return max(2, chunks), []

    def _uneven_layers(self) -> tuple[int, list[str]]:
        """Middle stages have one layer a chunk, a longer first or last one has two."""
        args, words, rest, middle_stages = self.args, [], self.args.num_layers, self.pp
        ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        for name in ends:
            if getattr(args, name) is not None:
                rest, middle_stages = rest - getattr(args, name), middle_stages - 1
        middle = rest / middle_stages if middle_stages else 0
        layers = middle_stages * self.vpp
        for name in ends:
            if (count := getattr(args, name)) is not None:
                value = self.vpp * (2 if count > middle else 1)
                self._change(name, value)
                words += [all_flags()[name].names[0], str(value)]
                layers += value
        return layers, words

    # --- widths ---

    def _set_widths(self) -> None:
        args = self.args
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        share = args.num_attention_heads // groups
        inner = {"a2a": self.cp, "a2a+p2p": (args.hierarchical_context_parallel_sizes or [1])[0]}
        exchanged = math.lcm(1, *(inner.get(kind, 1) for kind in args.cp_comm_type or ()))
        # Whether ranks share a group of keys, and whether there is more than one, decides which code runs.
        kind = lambda g: (g > 1, g % (self.tp * exchanged) == 0, g * share // self.tp % exchanged == 0)  # noqa: E731
        fitting = [g for g in range(self.tp, groups + 1, self.tp) if kind(g) == kind(groups)]
        groups = next((g for g in fitting if g * share >= FEWEST_HEADS), fitting[-1])
        heads = groups * share
        own_width = args.kv_channels is not None and args.kv_channels * args.num_attention_heads != args.hidden_size
        step = math.lcm(16, self.tp)
        hidden = -(-32 // step) * step if own_width else heads * HEAD_WIDTH
        ratio = (args.ffn_hidden_size or 4 * args.hidden_size) / args.hidden_size
        vocab_step = 8 * self.tp
        self.sizes: dict[str, Any] = {
            "num_layers": self.layers,
            "hidden_size": hidden,
            "ffn_hidden_size": max(1, round(ratio * hidden / step)) * step,
            "num_attention_heads": heads,
            "vocab_size": 8 * vocab_step - 5,  # and one for the end of documents: four rows of padding
            "make_vocab_size_divisible_by": 8,
        }
        if args.group_query_attention:
            self.sizes["num_query_groups"] = groups
        if own_width:
            self.sizes["kv_channels"] = HEAD_WIDTH
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            if args.num_experts and (width := getattr(args, name)) is not None:
                self.sizes[name] = max(1, round(width / args.hidden_size * hidden / step)) * step
        if args.model_family == "mamba":
            self.sizes |= hybrid.sizes(args, self.layers)
            self.replaced |= {"hybrid_attention_ratio", "hybrid_mlp_ratio"}
        self.replaced |= {"encoder_num_layers", "kv_channels", "num_query_groups"}

    # --- lengths ---

    def _set_lengths(self) -> None:
        args = self.args
        step = math.lcm(2 * self.cp, self.tp * self.cp)
        shortest = hybrid.SHORTEST if args.model_family == "mamba" else SHORTEST
        length = -(-shortest // step) * step
        self.sizes |= {"seq_length": length, "max_position_embeddings": length}
        if args.yarn_original_max_position_embeddings:
            self.sizes["yarn_original_max_position_embeddings"] = length // 2
        self.replaced |= {"encoder_seq_length", "decoder_seq_length"}
        self.length = length

    def _lists(self) -> list[str]:
        """Settings that have one entry for each layer, or that are lengths in a list."""
        words: list[str] = []
        if self.args.window_size is not None:
            window = [max(1, w * self.length // self.args.seq_length) if w > 0 else w for w in self.args.window_size]
            self._change("window_size", window)
            words += ["--window-size", *map(str, window)]
        if isinstance(self.args.no_rope_freq, list):
            self.replaced.add("no_rope_freq")
            words += ["--no-rope-freq", str(self.args.no_rope_freq[: self.layers])]
        if isinstance(self.args.moe_layer_freq, list):
            self.replaced.add("moe_layer_freq")
            words += ["--moe-layer-freq", str(self.args.moe_layer_freq[: self.layers])]
        return words

    # --- batch ---

    def _set_batch(self) -> None:
        """Enough micro-batches to fill the pipeline twice, in groups as an interleaved schedule wants them."""
        args = self.args
        self.micro_batch = min(args.micro_batch_size, 2)
        group = getattr(args, "microbatch_group_size_per_vp_stage", None) or self.pp
        count = group if args.rampup_batch_size else max(2, 2 * group if self.pp > 1 else 2)
        self.global_batch = self.micro_batch * self.dp * count * (2 if args.rampup_batch_size else 1)
        if args.micro_batch_size != self.micro_batch:
            self.changes.append(f"--micro-batch-size {args.micro_batch_size} -> {self.micro_batch}")
        if args.global_batch_size != self.global_batch:
            self.changes.append(f"--global-batch-size {args.global_batch_size} -> {self.global_batch}")


def _short_layout(text: str, pipeline_size: int) -> tuple[str, int]:
    """(a layout with one layer where there was one and two where there were more, its layers)."""
    letter_of = {kind: letter for letter, kind in LETTERS.items()}
    stages = []
    for stage in PipelineParallelLayerLayout(text, pipeline_size).stages:
        letters = "".join(letter_of[kind] for kind in stage)
        runs = ["".join(run) for _, run in groupby(letters)]
        stages.append("".join(run[:2] if run[0] == "t" else run for run in runs))
    short = "|".join(stages)
    return short, short.count("t")


__all__ = ["ConfigurationError", "Shrunk", "shrink"]
