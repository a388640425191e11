"""Flags that cannot be read off their field: other names, other defaults, other types.

The rule without an entry: `num_layers` is `--num-layers`; a bool that is on by default is switched off by
`--no-...`; `list[int]` takes one or more values, `list[str]` any number; a Literal's values are the choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SAME = object()
"""Stands for: as the field says."""


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How one field's flag departs from the rule."""

    flag: str = ""
    """The flag; empty is the field's name with dashes."""
    aliases: tuple[str, ...] = ()
    """Further flags with the same meaning."""
    dest: str = ""
    """Name among the parsed arguments; empty is the field's."""
    inverted: bool = False
    """The argument says that the field is off."""
    default: Any = SAME
    """Default on the command line where it is not the field's."""
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] = ()
    nargs: str | int | None = None


SPELLINGS: dict[str, Spelling] = {
    # --- fields of the library's classes: sizes ---
    "num_layers": Spelling(default=None),
    "hidden_size": Spelling(default=None),
    "num_attention_heads": Spelling(default=None),
    "num_query_groups": Spelling(default=1),
    "layernorm_epsilon": Spelling(flag="--norm-epsilon", dest="norm_epsilon"),
    "layernorm_zero_centered_gamma": Spelling(flag="--apply-layernorm-1p", dest="apply_layernorm_1p"),
    "mtp_loss_scaling_factor": Spelling(default=0.1),
    "num_moe_experts": Spelling(flag="--num-experts", dest="num_experts"),
    "moe_aux_loss_coeff": Spelling(default=0.0),
    "add_bias_linear": Spelling(flag="--disable-bias-linear"),
    "perform_initialization": Spelling(flag="--no-initialization"),
    "use_cpu_initialization": Spelling(default=None),
    "persist_layer_norm": Spelling(
        flag="--no-persist-layer-norm", dest="no_persist_layer_norm", default=True, inverted=True
    ),
    "use_mamba_mem_eff_path": Spelling(
        flag="--disable-mamba-mem-eff-path", dest="disable_mamba_mem_eff_path", inverted=True
    ),
    "q_lora_rank": Spelling(default=None),
    "kv_lora_rank": Spelling(default=32),
    "rotary_scaling_factor": Spelling(default=1.0),
    "mscale": Spelling(default=1.0),
    "mscale_all_dim": Spelling(default=1.0),
    # --- kernels: on by default for programs, off for the library ---
    "masked_softmax_fusion": Spelling(default=True),
    "bias_dropout_fusion": Spelling(default=True),
    "apply_rope_fusion": Spelling(flag="--no-rope-fusion", default=True),
    "gradient_accumulation_fusion": Spelling(default=True),
    "async_tensor_model_parallel_allreduce": Spelling(default=True),
    "distribute_saved_activations": Spelling(default=False),
    "cpu_offloading_weights": Spelling(default=False),
    "attention_softmax_in_fp32": Spelling(default=False),
    "fp8": Spelling(flag="--fp8-format"),
    "use_te_rng_tracker": Spelling(flag="--te-rng-tracker", dest="te_rng_tracker"),
    # --- parallel layout ---
    "num_layers_in_first_pipeline_stage": Spelling(
        flag="--decoder-first-pipeline-num-layers", dest="decoder_first_pipeline_num_layers"
    ),
    "num_layers_in_last_pipeline_stage": Spelling(
        flag="--decoder-last-pipeline-num-layers", dest="decoder_last_pipeline_num_layers"
    ),
    "pipeline_model_parallel_layout": Spelling(type=str),
    "microbatch_group_size_per_vp_stage": Spelling(flag="--microbatch-group-size-per-virtual-pipeline-stage"),
    "overlap_p2p_comm": Spelling(flag="--no-overlap-p2p-communication", default=True),
    "overlap_p2p_comm_warmup_flush": Spelling(flag="--overlap-p2p-communication-warmup-flush"),
    "cp_comm_type": Spelling(type=str, nargs="+", default=["p2p"]),
    "tp_comm_overlap_ag": Spelling(flag="--disable-tp-comm-overlap-ag"),
    "tp_comm_overlap_rs": Spelling(flag="--disable-tp-comm-overlap-rs"),
    "tp_comm_bulk_dgrad": Spelling(flag="--disable-tp-comm-bulk-dgrad"),
    "tp_comm_bulk_wgrad": Spelling(flag="--disable-tp-comm-bulk-wgrad"),
    "tp_comm_split_ag": Spelling(flag="--disable-tp-comm-split-ag"),
    "tp_comm_split_rs": Spelling(flag="--disable-tp-comm-split-rs"),
    "barrier_with_L1_time": Spelling(flag="--no-barrier-with-level-1-timing"),
    # --- gradients and optimizer ---
    "check_for_nan_in_grad": Spelling(
        flag="--no-check-for-nan-in-loss-and-grad", dest="check_for_nan_in_loss_and_grad", default=True
    ),
    "grad_reduce_in_fp32": Spelling(
        flag="--accumulate-allreduce-grads-in-fp32", dest="accumulate_allreduce_grads_in_fp32"
    ),
    "bucket_size": Spelling(flag="--ddp-bucket-size", dest="ddp_bucket_size"),
    "pad_buckets_for_high_nccl_busbw": Spelling(
        flag="--ddp-pad-buckets-for-high-nccl-busbw", dest="ddp_pad_buckets_for_high_nccl_busbw"
    ),
    "average_in_collective": Spelling(flag="--ddp-average-in-collective", dest="ddp_average_in_collective"),
    "align_param_gather": Spelling(default=True),
    "nccl_ub": Spelling(flag="--use-nccl-ub"),
    "min_lr": Spelling(default=0.0),
    "optimizer_offload_fraction": Spelling(default=1.0),
    "main_grads_dtype": Spelling(type=str, choices=("fp32", "bf16"), default="fp32"),
    "main_params_dtype": Spelling(type=str, choices=("fp32", "fp16"), default="fp32"),
    "exp_avg_dtype": Spelling(type=str, choices=("fp32", "fp16", "bf16", "fp8"), default="fp32"),
    "exp_avg_sq_dtype": Spelling(type=str, choices=("fp32", "fp16", "bf16", "fp8"), default="fp32"),
    # --- fields of the application's own classes ---
    "add_position_embedding": Spelling(flag="--no-position-embedding"),
    "bert_binary_head": Spelling(flag="--bert-no-binary-head"),
    "enable_gloo_process_groups": Spelling(flag="--disable-gloo-process-groups"),
    "deprecated_use_mcore_models": Spelling(flag="--use-mcore-models"),
    "override_opt_param_scheduler": Spelling(flag="--override-opt_param-scheduler"),
    "use_checkpoint_opt_param_scheduler": Spelling(flag="--use-checkpoint-opt_param-scheduler"),
    "save_interval": Spelling(aliases=("--persistent-save-interval",)),
    "ckpt_fully_parallel_save_deprecated": Spelling(flag="--ckpt-fully-parallel-save"),
    "torch_fsdp2_reshard_after_forward": Spelling(flag="--torch-fsdp2-no-reshard-after-forward"),
    "tiktoken_special_tokens": Spelling(nargs="+"),
    "inference_max_batch_size": Spelling(flag="--inference-max-requests"),
    "retro_verify_neighbor_count": Spelling(flag="--retro-no-verify-neighbor-count"),
    "yaml_cfg": Spelling(aliases=("--config",)),
    "use_dist_ckpt_deprecated": Spelling(flag="--use-dist-ckpt"),
    "dist_ckpt_format_deprecated": Spelling(flag="--dist-ckpt-format"),
    "enable_one_logger": Spelling(flag="--no-one-logger"),
    "enable_msc": Spelling(flag="--disable-msc"),
    "export_freeze_mtp": Spelling(nargs="*"),
    "onnx_safe": Spelling(type=bool),
    "lazy_mpu_init": Spelling(type=bool),
}
"""Field -> how its flag departs from the rule."""
