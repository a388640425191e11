"""Flags that are accepted although nothing here corresponds to them, and flags that other ones have replaced.

The former belong to a vendor's machinery, to packages that this project does without, or to older code. Set,
they are named in one warning. They do not show in --help, so their fields need no documentation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class ReplacedConfig:
    """Refused when given; `rules/replaced.py` names what to use instead."""

    batch_size: int | None = None
    warmup: int | None = None
    model_parallel_size: int | None = None
    checkpoint_activations: bool = False


@dataclass(kw_only=True)
class NoEffectConfig:
    """Accepted, without effect."""

    openai_gelu: bool = False
    onnx_safe: bool | None = None
    use_legacy_models: bool = False
    use_dist_ckpt_deprecated: bool = False
    dist_ckpt_format_deprecated: str | None = None
    lazy_mpu_init: bool | None = None
    adlr_autoresume: bool = False
    adlr_autoresume_interval: int = 1000
    classes_fraction: float = 1.0
    data_per_class_fraction: float = 1.0
    head_lr_mult: float = 1.0
    vision_pretraining: bool = False
    vision_pretraining_type: Literal["classify", "inpaint", "dino"] = "classify"
    vision_backbone_type: Literal["vit", "mit", "swin"] = "vit"
    swin_backbone_type: Literal["tiny", "base", "h3"] = "tiny"
    mask_type: Literal["random", "row"] = "random"
    mask_factor: float = 1.0
    iter_per_epoch: int = 1250
    dino_local_img_size: int = 96
    dino_local_crops_number: int = 10
    dino_head_hidden_size: int = 2048
    dino_bottleneck_size: int = 256
    dino_freeze_last_layer: float = 1
    dino_norm_last_layer: bool = False
    dino_warmup_teacher_temp: float = 0.04
    dino_teacher_temp: float = 0.07
    dino_warmup_teacher_temp_epochs: int = 30
    log_straggler: bool = False
    disable_straggler_on_startup: bool = False
    straggler_ctrlr_port: int = 65535
    straggler_minmax_count: int = 1
    run_workload_inspector_server: bool = False
    enable_one_logger: bool = True
    one_logger_project: str = "megatron-lm"
    one_logger_run_name: str | None = None
    one_logger_async: bool = False
    app_tag_run_name: str | None = None
    app_tag_run_version: str = "0.0.0"
    inprocess_restart: bool = False
    inprocess_max_iterations: int | None = None
    inprocess_monitor_thread_interval: float = 1.0
    inprocess_monitor_process_interval: float = 1.0
    inprocess_progress_watchdog_interval: float = 1.0
    inprocess_heartbeat_interval: float = 30
    inprocess_soft_timeout: float = 60
    inprocess_hard_timeout: float = 90
    inprocess_heartbeat_timeout: float = 60
    inprocess_barrier_timeout: float = 120
    inprocess_completion_timeout: float = 120
    inprocess_last_call_wait: float = 1
    inprocess_termination_grace_time: float = 1
    inprocess_granularity: Literal["node", "rank"] = "node"
    inprocess_active_world_size: int = field(default_factory=lambda: int(os.getenv("WORLD_SIZE", "1")))
    inprocess_empty_cuda_cache: bool = False
    enable_ft_package: bool = False
    calc_ft_timeouts: bool = False
    kitchen_config_file: str | None = None
    kitchen_recipe_number: int | None = None
    export_legacy_megatron: bool = False
    export_kv_cache_quant: bool = False
    export_real_quant_cfg: Literal["fp8_real_quant", "fp8_blockwise_real_quant", "None"] = "None"
    export_kd_teacher_ckpt_format: Literal["torch", "torch_dist", "zarr", "torch_dcp"] | None = None
    export_num_medusa_heads: int = 0
    export_eagle_algorithm: Literal["eagle1", "eagle3", "eagle-mtp"] = "eagle-mtp"
    export_num_eagle_layers: int = 0
    export_draft_vocab_size: int = 0
    export_num_mtp: int = 0
    export_freeze_mtp: list[int] = field(default_factory=list)
    finetune_data_split: str = "train"
