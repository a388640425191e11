"""Batches, length, profiling and housekeeping of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class TrainingConfig:
    """What one step is, how many there are and what happens around them."""

    micro_batch_size: int | None = None
    """Samples per forward pass of one data parallel rank."""
    global_batch_size: int | None = None
    """Samples per optimizer step over all ranks; unset is one microbatch per data parallel rank."""
    rampup_batch_size: list[str] | None = None
    """Three numbers: first global batch size, its increment, and over how many samples it grows."""
    decrease_batch_size_if_needed: bool = False
    """Round the global batch size down to what the ranks can share equally."""
    recompute_activations: bool = False
    """Short for --recompute-granularity selective."""
    check_for_spiky_loss: bool = False
    """Watch for losses far above the recent ones."""
    profile: bool = False
    """Profile the steps from --profile-step-start to --profile-step-end."""
    profile_step_start: int = 10
    """First step that is profiled."""
    profile_step_end: int = 12
    """Step at which profiling ends."""
    iterations_to_skip: list[int] = field(default_factory=list)
    """Iterations whose data is read but not trained on."""
    result_rejected_tracker_filename: str | None = None
    """File with iterations that result validation has rejected; they are skipped."""
    enable_gloo_process_groups: bool = True
    """Also build gloo groups for data that lies in host memory."""
    use_pytorch_profiler: bool = False
    """Profile with torch.profiler."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that profile."""
    record_memory_history: bool = False
    """Record allocations of device memory; the last rank writes them at each log."""
    memory_snapshot_path: str = "snapshot.pickle"
    """File for that record."""
    tp_comm_overlap_cfg: str | None = None
    """YAML file that tunes the overlap of tensor parallel communication."""
    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Return cached device memory: 0 never, 1 after forward and backward, 2 also after the optimizer step."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Steps between checks that data parallel ranks hold equal weights."""
    train_sync_interval: int | None = None
    """Steps between forced synchronisations with the device."""
    train_iters: int | None = None
    """Length of the run in optimizer steps."""
    train_samples: int | None = None
    """Length of the run in samples."""
    log_interval: int = 100
    """Steps between log lines."""
    exit_interval: int | None = None
    """Stop at the first iteration that is a multiple of this."""
    exit_duration_in_mins: int | None = None
    """Stop after this many minutes."""
    exit_signal_handler: bool = False
    """Save and stop on SIGTERM."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard."""
    bias_gelu_fusion: bool = True
    """Add the bias and apply gelu in one kernel."""
    bias_swiglu_fusion: bool = True
    """Add the bias and apply SwiGLU in one kernel."""
    use_flash_attn: bool = False
    """Attention by the flash-attn package (as --attention-backend flash)."""
    dataloader_type: Literal["single", "cyclic", "external"] | None = None
    """One pass over the samples, shuffled passes without end, or a loader of the program's own."""
    deprecated_use_mcore_models: bool = False
    """No effect: there are no other models."""
    manual_gc: bool = False
    """Collect Python's garbage at chosen steps only, so that ranks pause together."""
    manual_gc_interval: int = 0
    """Steps between collections; 0 collects around evaluation only."""
    manual_gc_eval: bool = True
    """Collect before and after evaluation."""
    high_priority_stream_groups: list[str] = field(default_factory=list)
    """Process groups whose CUDA streams get priority."""


@dataclass(kw_only=True)
class InitializationConfig:
    """Seeds and initial weights."""

    seed: int = 1234
    """Seed of weights, dropout and data order."""
    data_parallel_random_init: bool = False
    """Draw different initial weights on each data parallel rank."""
    init_method_xavier_uniform: bool = False
    """Draw initial weights from Xavier's uniform distribution."""


@dataclass(kw_only=True)
class ValidationConfig:
    """When and how long to evaluate."""

    eval_iters: int = 100
    """Global batches per evaluation."""
    full_validation: bool = False
    """Validate on every sample of the validation data once, rather than on --eval-iters batches of it."""
    multiple_validation_sets: bool = False
    """Validate on each data set of --valid-data-path by itself, with a loss for each."""
    eval_interval: int = 1000
    """Steps between evaluations."""
    skip_train: bool = False
    """Only evaluate."""


@dataclass(kw_only=True)
class MixedPrecisionConfig:
    """Precision of what lies outside of the layers."""

    grad_reduce_in_bf16: bool = False
    """Keep and reduce gradients in bfloat16."""
    fp16_lm_cross_entropy: bool = False
    """Compute the loss in float16."""


@dataclass(kw_only=True)
class RerunConfig:
    """Detection of hardware faults by running steps again."""

    error_injection_rate: int = 0
    """Inject one fault per this many checks; 0 is off."""
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = "transient_error"
    """Kind of injected fault."""
    rerun_mode: Literal["disabled", "validate_results", "report_stats"] = "disabled"
    """Run steps again to catch or count wrong results."""
