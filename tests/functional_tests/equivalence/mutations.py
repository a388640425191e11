"""Planted mistakes, one line each, that the fast selection must notice.

A mutation replaces one function of the library in every worker. It says which layouts are able to notice it, by the
values of their axes, and which comparison (or which check's message) must.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.collectives import InFlight
from megatron.core.pipeline_parallel.plan import plan_pipeline
from megatron.core.process_groups_config import default_process_groups
from megatron.core.utils import get_pg_rank, get_pg_size

MANY = ("2", "4")
BUFFERS = ("none", "optimizer")
"""Ways of sharding with which gradients are summed in buckets."""


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    name: str
    target: str
    """`module:attribute`, where the attribute may be that of a class."""
    change: Callable[[Any], Any]
    """Makes the mistake of the right function."""
    layout: dict[str, str | tuple[str, ...]]
    """Values of axes with which it matters."""
    noticed_by: str
    """The quantity that violates its bound, or words of the error that a check raises."""

    def matters_in(self, row: dict[str, str]) -> bool:
        """Whether a layout is one of those that must notice it."""
        return all(row[a] in (wanted if isinstance(wanted, tuple) else (wanted,)) for a, wanted in self.layout.items())

    def smallest_layout(self) -> dict[str, str]:
        """The first of the values wanted of each axis."""
        return {axis: wanted if isinstance(wanted, str) else wanted[0] for axis, wanted in self.layout.items()}


@contextmanager
def planted(mutation: Mutation | None) -> Iterator[None]:
    """Inside, this mistake is in place on this rank; none for None."""
    if mutation is None:
        yield
        return
    module, _, path = mutation.target.partition(":")
    *owners, attribute = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    right = inspect.getattr_static(owner, attribute)
    if isinstance(right, staticmethod):
        wrong: Any = staticmethod(mutation.change(right.__func__))
    elif isinstance(right, classmethod):
        wrong = classmethod(mutation.change(right.__func__))
    else:
        wrong = mutation.change(right)
    setattr(owner, attribute, wrong)
    plan_pipeline.cache_clear()  # workers remember plans from run to run
    try:
        yield
    finally:
        setattr(owner, attribute, right)
        plan_pipeline.cache_clear()


def nothing(right: Any) -> Any:
    """The function does nothing."""
    return lambda *args, **kwargs: None


def twice(right: Any) -> Any:
    """The function is called twice."""
    return lambda *args, **kwargs: (right(*args, **kwargs), right(*args, **kwargs))[1]


def own_rows(x: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's part of the first dimension."""
    return x.chunk(get_pg_size(group))[get_pg_rank(group)].contiguous()


CORE = "megatron.core"
TP = f"{CORE}.tensor_parallel"
FINALIZE = f"{CORE}.distributed.finalize_model_grads"
MICROBATCH = f"{CORE}.pipeline_parallel.microbatch"
NORM_GRADS = f"{CORE}.optimizer.megatron_optimizer:MegatronOptimizer.get_main_grads_for_grad_norm"

MUTATIONS = [
    # --- tensor and sequence parallel ---
    Mutation(
        "gradient of a column-parallel input stays partial",
        f"{TP}.linear:start_all_reduce",
        lambda right: lambda x, group: InFlight(x, None),
        {"tp": MANY, "sp": "off"},
        "gradients",
    ),
    Mutation(
        "output of a row-parallel layer stays partial",
        f"{TP}.mappings:_ReduceFromModelParallelRegion.forward",
        lambda right: lambda ctx, x, group: x.clone(),
        {"tp": MANY, "sp": "off"},
        "loss",
    ),
    Mutation(
        "row-parallel outputs are summed over data instead of tensor parallel ranks",
        f"{TP}.mappings:_reduce",
        lambda right: lambda x, group: right(x, default_process_groups().dp),
        {"tp": MANY, "sp": "off"},
        "loss",
    ),
    Mutation(
        "under sequence parallelism a rank keeps its own part of the input gradient unsummed",
        f"{TP}.linear:start_reduce_scatter",
        lambda right: lambda x, group: InFlight(own_rows(x, group), None),
        {"sp": "on", "tp overlap": "off"},
        "gradients",
    ),
    Mutation(
        "gradients of sequence-parallel norms are not summed",
        f"{FINALIZE}:_reduce_sequence_parallel_grads",
        nothing,
        {"sp": "on"},
        "gradients",
    ),
    Mutation(
        "gradients of sequence-parallel norms are summed twice",
        f"{FINALIZE}:_reduce_sequence_parallel_grads",
        twice,
        {"sp": "on"},
        "gradients",
    ),
    # --- vocabulary ---
    Mutation(
        "padding of the vocabulary takes part in the softmax",
        f"{CORE}.models.common.language_module.language_module:vocab_parallel_cross_entropy",
        lambda right: lambda *args, vocab_size, **kwargs: right(*args, **kwargs),
        {"vocabulary": ("padded", "mostly padding")},
        "loss",
    ),
    Mutation(
        "gradients of tied embeddings are not exchanged",
        f"{FINALIZE}:_reduce_shared_grads",
        nothing,
        {"output": "tied", "pp": MANY},
        "gradients",
    ),
    Mutation(
        "gradients of tied embeddings are exchanged twice",
        f"{FINALIZE}:_reduce_shared_grads",
        twice,
        {"output": "tied", "pp": MANY},
        "gradients",
    ),
    # --- gradient norm ---
    Mutation(
        "every tensor parallel rank counts the weights that all of them hold",
        NORM_GRADS,
        lambda right: lambda self: [main.grad for p, main in self.pairs() if not getattr(p, "shared", False)],
        {"tp": MANY, "sharding": "none"},
        "gradient norm",
    ),
    Mutation(
        "both copies of a tied embedding are counted",
        NORM_GRADS,
        lambda right: lambda self: [*right(self), *(m.grad for p, m in self.pairs() if getattr(p, "shared", False))],
        {"output": "tied", "pp": MANY, "sharding": "none"},
        "gradient norm",
    ),
    Mutation(
        "the norm is that of one rank's gradients",
        f"{CORE}.optimizer.megatron_optimizer:reduce_over",
        nothing,
        {"pp": MANY, "sharding": "none"},
        "gradient norm",
    ),
    # --- normalisation ---
    Mutation(
        "gradients of replicas are summed instead of averaged",
        f"{CORE}.distributed.distributed_data_parallel:DistributedDataParallel._gradient_scaling_factor",
        lambda right: lambda self, group: 1.0,
        {"dp": MANY, "sharding": BUFFERS, "average": "scaled", "loss": "per micro-batch"},
        "gradients",
    ),
    Mutation(
        "gradients of replicas are averaged twice",
        f"{CORE}.distributed.distributed_data_parallel:DistributedDataParallel._gradient_scaling_factor",
        lambda right: lambda self, group: 1.0 / get_pg_size(group),
        {"dp": MANY, "sharding": BUFFERS, "average": "collective"},
        "gradients",
    ),
    Mutation(
        "the loss is not divided by the number of micro-batches",
        f"{MICROBATCH}:_scaled_loss",
        lambda right: lambda outputs, num_microbatches, *rest: right(outputs, 1, *rest),
        {"dp": ("1", "2"), "loss": "per micro-batch"},
        "gradients",
    ),
    Mutation(
        "tokens are counted over tensor parallel instead of data parallel ranks",
        f"{FINALIZE}:_divide_by_tokens",
        lambda right: lambda model, num_tokens, groups: right(model, num_tokens, replace(groups, dp_cp=groups.tp)),
        {"loss": "per token", "dp": MANY, "tp": "1"},
        "gradients",
    ),
    Mutation(
        "only the last stage knows the number of tokens",
        f"{FINALIZE}:_divide_by_tokens",
        lambda right: lambda model, num_tokens, groups: right(model, num_tokens, replace(groups, pp=None)),
        {"loss": "per token", "pp": MANY},
        "gradients",
    ),
    Mutation(
        "tokens that are masked count in the loss",
        "pretrain_gpt:loss_func",
        lambda right: lambda loss_mask, output: right(torch.ones_like(loss_mask), output),
        {"tokens": "uneven"},
        "loss",
    ),
    Mutation(
        "the logged loss is that of one replica",
        "megatron.training.train_step:all_reduce",
        nothing,
        {"dp": MANY},
        "loss",
    ),
    # --- initial weights ---
    Mutation(
        "initial weights depend on the rank",
        f"{TP}.initialization:_derived_seed",
        lambda right: lambda seed, name, block: right(seed + dist.get_rank(), name, block),
        {"pp": MANY},
        "initial weights",
    ),
    Mutation(
        "every stage initialises its layers as if they were the first",
        f"{CORE}.models.gpt.gpt_model:initialize_parameters",
        lambda right: lambda module, **kwargs: right(module),
        {"pp": MANY},
        "initial weights",
    ),
    Mutation(
        "gate and up projection are cut as one matrix",
        f"{TP}.initialization:ParameterInit.local_ranges",
        lambda right: lambda self, local: right(replace(self, stride=1), local),
        {"tp": MANY, "block": "llama"},
        "initial weights",
    ),
    # --- pipeline ---
    Mutation(
        "one warm-up forward too many",
        f"{CORE}.pipeline_parallel.orders:_one_by_one",
        lambda right: lambda warmup, request: right(warmup + 1, request),
        {"pp": MANY, "schedule": ("1f1b", "interleaved 2", "interleaved 4")},
        "predicted were",
    ),
    Mutation(
        "one warm-up forward too few",
        f"{CORE}.pipeline_parallel.orders:_one_by_one",
        lambda right: lambda warmup, request: right(warmup - 1, request),
        {"pp": MANY, "schedule": ("1f1b", "interleaved 2", "interleaved 4")},
        "does not complete",
    ),
    Mutation(
        "postponed gradients of weights are forgotten",
        f"{TP}.weight_grad_queue:WeightGradQueue.run",
        nothing,
        {"schedule": ("zb-h1", "zb-v"), "pp": MANY},
        "gradients",
    ),
    # --- data ---
    Mutation(
        "all replicas read the same samples",
        "megatron.training.setup:build_pretraining_data_loader",
        lambda right: lambda *args, **kwargs: right(*args, **{**kwargs, "data_parallel_rank": 0}),
        {"dp": MANY},
        "loss",
    ),
    Mutation(
        "documents see each other",
        f"{CORE}.packed_seq_params:PackedSeqParams.from_documents",
        lambda right: lambda cls, *args: None,
        {"documents": "isolated", "attention": "sdpa"},
        "loss",
    ),
    # --- distributed optimizer, overlap ---
    Mutation(
        "each rank updates the part of its neighbour",
        f"{CORE}.distributed.bucket_layout:BucketLayout.shard",
        lambda right: lambda self, rank, num_shards: right(self, (rank + 1) % num_shards, num_shards),
        {"sharding": "optimizer", "dp": MANY, "optimizer instances": "1"},
        "weights",
    ),
    Mutation(
        "updated weights are not gathered",
        f"{CORE}.distributed.bucket_group:start_all_gather",
        lambda right: lambda x, group, into, what: InFlight(into, None),
        {"sharding": "optimizer", "dp": MANY, "optimizer instances": "1"},
        "loss",
    ),
    Mutation(
        "forward does not wait for overlapped gathers",
        f"{CORE}.distributed.overlap:WeightGatherer.require",
        nothing,
        {"overlap": "gradients and weights", "dp": MANY, "optimizer instances": "1"},
        "loss",
    ),
    Mutation(
        "gradients are sent off before the last micro-batch",
        f"{CORE}.distributed.overlap:GradReducer.gradient_added",
        lambda right: lambda self, param: None if setattr(self, "is_last_microbatch", True) else right(self, param),
        {"overlap": ("gradients", "gradients and weights"), "batch size": "growing", "micro-batch": "1"},
        "after its bucket was sent off",
    ),
    Mutation(
        "gradients are not summed across instances of the optimizer",
        f"{CORE}.distributed.bucket_group:_ParamAndGradBucketGroup._launch_across",
        lambda right: lambda self: setattr(self, "_across", []),
        {"optimizer instances": "2"},
        "gradients",
    ),
    # --- recompute ---
    Mutation(
        "recomputed layers pass no gradient to their input",
        f"{TP}.recompute:_backward",
        lambda right: lambda args, *rest: [None for _ in right(args, *rest)],
        {"recompute": ("uniform", "block"), "pp": "1"},
        "gradients",
    ),
    # --- context parallel ---
    Mutation(
        "context parallel ranks hold plain instead of zigzag parts",
        "pretrain_gpt:get_batch_on_this_cp_rank",
        lambda right: lambda batch: {
            key: value if value is None else value.chunk(get_pg_size(default_process_groups().cp), 1)[
                get_pg_rank(default_process_groups().cp)
            ].contiguous()
            for key, value in batch.items()
        },
        {"cp": MANY, "attention": "sdpa"},
        "loss",
    ),
    Mutation(
        "each context parallel rank divides by its own tokens",
        f"{MICROBATCH}:_tokens_of_samples",
        lambda right: lambda num_tokens, *rest: torch.as_tensor(num_tokens).clamp(min=1),
        {"cp": MANY, "loss": "per micro-batch"},
        "gradients",
    ),
    Mutation(
        "keys that come around the ring are taken for those of another rank",
        f"{CORE}.transformer.context_parallel.task:AttentionTask.forward",
        lambda right: lambda self, q, k, v, key_rank, out, lse: right(self, q, k, v, self.rank, out, lse),
        {"cp": MANY, "cp type": "p2p"},
        "loss",
    ),
]  # fmt: skip

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


def _unshifted(right: Any) -> Any:
    """Context rank 1 takes what belongs to rank 0."""
    return lambda self, param: param if self.size == 1 else param.chunk(self.size)[0]


def _of_next_rank(right: Any) -> Any:
    def wrong(self: Any, param: Any) -> Any:
        rank, self.rank = self.rank, (self.rank + 1) % self.size
        try:
            return right(self, param)
        finally:
            self.rank = rank

    return wrong


_MAMBA = [
    Mutation(
        "z, x, B, C and dt are cut as one matrix",
        f"{TP}.initialization:ParameterInit.local_ranges",
        lambda right: lambda self, local: right(replace(self, parts=()), local),
        {},
        "initial weights",
    ),
    Mutation(
        "the convolution has the filters of another context rank",
        f"{CORE}.ssm.context_parallel:HeadsOfRank.of_channels",
        _of_next_rank,
        {},
        "loss",
    ),
    Mutation(
        "context ranks take the decays of the first one",
        f"{CORE}.ssm.context_parallel:HeadsOfRank.of_heads",
        _unshifted,
        {},
        "loss",
    ),
    Mutation(
        "a context rank keeps its tokens in zigzag",
        f"{CORE}.transformer.context_parallel.head_exchange:reordered",
        lambda right: lambda x, order: x,
        {},
        "loss",
    ),
    Mutation(
        "states are not carried from chunk to chunk",
        f"{CORE}.ssm.ssd:_carry",
        lambda right: lambda whole, own, state: (torch.zeros_like(own), own[-1]),
        {},
        "loss",
    ),
    Mutation(
        "a hybrid's stage takes the layers of the first one",
        f"{CORE}.ssm.mamba_block:layers_of_chunk",
        lambda right: lambda config, rank, chunk: right(config, 0, chunk),
        {},
        "initial weights",
    ),
    Mutation(
        "the norm of the gated output is over all groups of a rank",
        f"{CORE}.ssm.gated_norm:GatedRMSNorm._normed",
        lambda right: lambda self, x: right(_with(self, num_groups=1), x),
        {},
        "loss",
    ),
    Mutation(
        "the gradient of the decays forgets what they divide",
        f"{CORE}.ssm.ssd:_carry_back",
        lambda right: lambda whole, d_begin, d_state: [part * 0 for part in right(whole, d_begin, d_state)],
        {},
        "gradients",
    ),
]
OF_MAMBA = {mutation.name: mutation for mutation in _MAMBA}
"""Mistakes that only models with state space layers notice (test_mamba.py)."""


def _with(module: Any, **values: Any) -> Any:
    """A copy of a module with other settings, of the same parameters."""
    other = copy.copy(module)
    other.__dict__ = {**module.__dict__, **values}
    return other
