"""How a model is spread over ranks, in which precision it runs and how its ranks talk to each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron.core.config_rules import require, require_together, shown
from megatron.core.not_built import refuse_fields_not_built


@dataclass
class ModelParallelConfig:
    """Parallel layout, precision and communication of any model.

    Each field's docstring is also the help of the flag that carries its name.
    """

    # --- parallel layout ---
    tensor_model_parallel_size: int = 1
    """Ranks that split every layer's matrices (tensor parallelism)."""
    pipeline_model_parallel_comm_backend: Literal["nccl", "ucc"] | None = None
    """torch.distributed backend of the pipeline groups; unset takes that of the other groups."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the stack of layers (pipeline stages)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks held by each pipeline rank; unset means one."""
    sequence_parallel: bool = False
    """Also split the norm and dropout regions, along the sequence, over the tensor parallel ranks."""
    context_parallel_size: int = 1
    """Ranks that split the sequence of one sample."""
    hierarchical_context_parallel_sizes: list[int] | None = None
    """Sizes of the nested context parallel groups of a2a+p2p: ranks that exchange heads, then ranks of the ring; their
    product is the context parallel size."""
    expert_model_parallel_size: int = 1
    """Ranks that split the experts of a mixture-of-experts layer."""
    expert_tensor_parallel_size: int | None = None
    """Tensor parallel size inside an expert; unset takes the tensor parallel size."""
    moe_extended_tp: bool = False
    """Older spelling of an expert tensor parallel size that covers the expert parallel ranks; no effect."""

    # --- initialisation ---
    perform_initialization: bool = True
    """Fill the weights when the model is built; off when a checkpoint will replace them all."""
    use_cpu_initialization: bool = False
    """Draw initial weights on the CPU. No effect: always so, for values must not depend on the layout."""

    # --- precision ---
    fp16: bool = False
    """Compute in float16, with a loss scale."""
    bf16: bool = False
    """Compute in bfloat16."""
    params_dtype: torch.dtype = torch.float32
    """Type of the weights that the layers compute with."""

    # --- hooks that the training program hands to the schedules ---
    timers: Callable[..., Any] | None = None
    """`timers(name, log_level)` gives the timer of that name."""
    finalize_model_grads_func: Callable[..., Any] | None = None
    """Reduces gradients over the ranks that share weights, once those of all microbatches are there."""
    grad_scale_func: Callable[..., Any] | None = None
    """Scales the loss before backward (float16)."""
    no_sync_func: Callable[..., Any] | None = None
    """Context in which backward leaves data parallel gradients unreduced; one, or one per model chunk."""
    grad_sync_func: Callable[..., Any] | None = None
    """Starts the asynchronous reduction of a chunk's gradients."""
    param_sync_func: Callable[..., Any] | None = None
    """Starts the asynchronous gathering of a chunk's weights."""

    # --- reproducibility ---
    deterministic_mode: bool = False
    """Use only kernels whose results are bitwise reproducible."""

    # --- autocast ---
    enable_autocast: bool = False
    """Run the model under torch.autocast."""
    autocast_dtype: torch.dtype | None = None
    """Type of that autocast; unset takes that of the weights."""

    # --- memory ---
    num_microbatches_with_partial_activation_checkpoints: int | None = None
    """Of the microbatches in flight on a stage, how many recompute only part of their layers."""

    # --- kernels and overlap ---
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the gradient buffer inside the matrix product, where a kernel for it exists."""
    async_tensor_model_parallel_allreduce: bool = False
    """No effect: the input gradient's all-reduce is always overlapped with the weight gradient."""
    torch_compile: bool = False
    """Compile what stands between matrix products and communication (torch.compile), once for all layers."""
    use_te_rng_tracker: bool = False
    """Keep random states the way Transformer Engine's CUDA graphs want them."""
    tp_comm_overlap: bool = False
    """Cut the collectives of sequence parallelism into pieces that travel while others are multiplied."""
    tp_comm_bulk_wgrad: bool = True
    """Within that overlap: reduce-scatter the input gradient behind the weight gradient."""
    tp_comm_bulk_dgrad: bool = True
    """Within that overlap: gather the input again, for the weight gradient, behind the input gradient."""
    tp_comm_overlap_ag: bool = True
    """Within that overlap: gather inputs (and, row-parallel, output gradients) piece by piece."""
    tp_comm_overlap_rs: bool = True
    """Within that overlap: reduce-scatter outputs piece by piece."""
    tp_comm_overlap_rs_dgrad: bool = False
    """Within that overlap: reduce-scatter input gradients piece by piece, instead of behind the weight gradient."""
    tp_comm_split_ag: bool = True
    """Older spelling of the pipelined all-gather."""
    tp_comm_atomic_ag: bool = False
    """Atomic variant of the pipelined all-gather."""
    tp_comm_split_rs: bool = True
    """Older spelling of the pipelined reduce-scatter."""
    tp_comm_atomic_rs: bool = False
    """Atomic variant of the pipelined reduce-scatter."""
    cross_entropy_loss_fusion: bool = False
    """Compute the vocabulary parallel loss in one fused kernel."""
    cross_entropy_fusion_impl: Literal["native", "te", "linear"] = "native"
    """Which fused loss: the native one, Transformer Engine's, or `linear`: output layer and loss in pieces of the
    tokens, so that the logits never exist as a whole (one more product of the output layer)."""
    tp_comm_overlap_disable_qkv: bool = False
    """Leave the query/key/value projection out of the overlap."""
    tp_comm_overlap_disable_fc1: bool = False
    """Leave the first feed-forward projection out of the overlap."""
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = "nccl"
    """Backend that sets up a vendor's buffers for the overlap; no effect, there are none."""

    # --- pipeline ---
    pipeline_dtype: torch.dtype | None = None
    """Type of the activations that travel between stages; needed with several stages."""
    variable_seq_lengths: bool = False
    """Microbatches differ in length, so stages send shapes before data."""
    overlap_p2p_comm: bool = False
    """Overlap the traffic between stages with computation (interleaved schedules)."""
    batch_p2p_comm: bool = True
    """Post a stage's sends and receives in one batch."""
    batch_p2p_sync: bool = True
    """Wait for the device after such a batch."""
    use_ring_exchange_p2p: bool = False
    """Use the ring exchange of a custom torch build; no effect here."""
    deallocate_pipeline_outputs: bool = False
    """Free an output's data once it is sent; backward needs only its graph."""
    defer_embedding_wgrad_compute: bool = False
    """Postpone the output layer's weight gradient to the pipeline's drain phase."""
    wgrad_deferral_limit: int = 0
    """For how many microbatches it is postponed; 0 is all."""
    pipeline_model_parallel_split_rank: int | None = None
    """Of a decoder behind an encoder: the pipeline rank of its first stage. `pipeline_model_parallel_size` counts the
    stages of one stack, here the decoder's."""
    overlap_p2p_comm_warmup_flush: bool = False
    """Overlap stage traffic in the warmup and drain phases too."""
    pipeline_schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = "auto"
    """Order of work in a pipeline: auto is 1f1b, interleaved with several model chunks; zb-h1 and zb-v (two chunks)
    fill idle time with weight gradients, computed apart from input gradients."""
    microbatch_group_size_per_vp_stage: int | None = None
    """Microbatches that run on one chunk before the next chunk's turn; unset is the number of stages."""
    delay_wgrad_compute: bool = False
    """Compute weight gradients apart from input gradients, so that they can fill gaps."""

    # --- activations kept in host memory ---
    cpu_offloading: bool = False
    """Keep in host memory what the first layers need for backward, until they go backward."""
    cpu_offloading_num_layers: int = 0
    """How many layers."""
    _cpu_offloading_context: AbstractContextManager[Any] | None = None
    cpu_offloading_activations: bool = True
    """Whether their activations move."""
    cpu_offloading_weights: bool = True
    """Whether their weights move too; not those that lie in the distributed optimizer's buffers."""

    # --- timing ---
    barrier_with_L1_time: bool = True
    """Put a barrier around level-1 timers, so that they measure the slowest rank."""

    @property
    def experts_have_own_replicas(self) -> bool:
        """Whether copies of an expert lie on other ranks than copies of dense weights."""
        return (
            self.expert_model_parallel_size > 1 or self.expert_tensor_parallel_size != self.tensor_model_parallel_size
        )

    def __post_init__(self) -> None:
        for rule in (
            refuse_fields_not_built,
            require_positive_parallel_sizes,
            require_tensor_parallel_for_sequence_parallel,
            require_sequence_parallel_for_overlap,
            derive_expert_tensor_parallel_size,
            derive_autocast_dtype,
            derive_microbatch_group_size,
            require_pipeline_dtype,
            require_schedule_fits_chunks,
            require_deferral_fits,
            require_sequence_parallel_for_experts,
            require_overlap_for_warmup_flush,
        ):
            rule(self)


def require_positive_parallel_sizes(config: ModelParallelConfig) -> None:
    """A parallel size counts ranks, so it is at least one."""
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        require(getattr(config, name) >= 1, f"{shown(config, name)} must be at least 1")


def require_tensor_parallel_for_sequence_parallel(config: ModelParallelConfig) -> None:
    """Sequence parallelism splits over the tensor parallel ranks, so there must be several."""
    if config.sequence_parallel:
        require(
            config.tensor_model_parallel_size > 1,
            f"sequence_parallel needs {shown(config, 'tensor_model_parallel_size')} to be at least 2",
        )


def require_sequence_parallel_for_overlap(config: ModelParallelConfig) -> None:
    """What is cut into pieces are the gathers and scatters along the sequence."""
    if config.tp_comm_overlap:
        require(config.sequence_parallel, "tp_comm_overlap needs sequence_parallel")


def derive_expert_tensor_parallel_size(config: ModelParallelConfig) -> None:
    """Experts are split like the other layers unless told otherwise."""
    if config.expert_tensor_parallel_size is None:
        config.expert_tensor_parallel_size = config.tensor_model_parallel_size


def derive_autocast_dtype(config: ModelParallelConfig) -> None:
    """Autocast computes in the type of the weights."""
    if config.autocast_dtype is None:
        config.autocast_dtype = config.params_dtype


def derive_microbatch_group_size(config: ModelParallelConfig) -> None:
    """A chunk runs one microbatch per stage before the next chunk's turn."""
    if config.microbatch_group_size_per_vp_stage is None:
        config.microbatch_group_size_per_vp_stage = config.pipeline_model_parallel_size


def require_pipeline_dtype(config: ModelParallelConfig) -> None:
    """Stages allocate what they receive before it comes, so its type must be known."""
    if config.pipeline_model_parallel_size > 1:
        require(
            config.pipeline_dtype is not None,
            f"{shown(config, 'pipeline_model_parallel_size')} needs pipeline_dtype, which stages receive",
        )


def require_schedule_fits_chunks(config: ModelParallelConfig) -> None:
    """A schedule is made for one model chunk on each rank, for two, or for any number."""
    name = config.pipeline_schedule
    if name == "auto":
        return
    if name == "zb-v" and config.virtual_pipeline_model_parallel_size is None:
        config.virtual_pipeline_model_parallel_size = 2
    chunks = config.virtual_pipeline_model_parallel_size or 1
    require(
        config.pipeline_model_parallel_size + (config.pipeline_model_parallel_split_rank or 0) > 1,
        f"{shown(config, 'pipeline_schedule')} needs pipeline_model_parallel_size of at least 2",
    )
    fits = {"interleaved": chunks > 1, "zb-v": chunks == 2}.get(name, chunks == 1)
    wanted = {"interleaved": "at least 2", "zb-v": "2"}.get(name, "unset")
    found = shown(config, "pipeline_schedule", "virtual_pipeline_model_parallel_size")
    require(fits, f"{found}: this schedule needs virtual_pipeline_model_parallel_size to be {wanted}")


def require_deferral_fits(config: ModelParallelConfig) -> None:
    """Only a pipeline has a drain phase; the work postponed to it ends in the gradient buffer."""
    if config.defer_embedding_wgrad_compute:
        require(
            config.pipeline_model_parallel_size > 1,
            "defer_embedding_wgrad_compute needs pipeline_model_parallel_size of at least 2",
        )
        require_together(config, "defer_embedding_wgrad_compute", "gradient_accumulation_fusion")
        require(config.wgrad_deferral_limit >= 0, f"{shown(config, 'wgrad_deferral_limit')} must not be negative")


def require_sequence_parallel_for_experts(config: ModelParallelConfig) -> None:
    """Were tokens held by every tensor parallel rank, an expert elsewhere would see each of them twice."""
    if config.expert_model_parallel_size > 1 and config.tensor_model_parallel_size > 1:
        require(
            config.sequence_parallel,
            f"{shown(config, 'expert_model_parallel_size', 'tensor_model_parallel_size')} together "
            "need sequence_parallel",
        )


def require_overlap_for_warmup_flush(config: ModelParallelConfig) -> None:
    """Overlap in the warmup and drain phases extends the overlap of the steady phase."""
    if config.overlap_p2p_comm_warmup_flush:
        require(
            config.overlap_p2p_comm and not config.batch_p2p_comm,
            "overlap_p2p_comm_warmup_flush needs overlap_p2p_comm on and batch_p2p_comm off, found "
            + shown(config, "overlap_p2p_comm", "batch_p2p_comm"),
        )
