"""Every setting of a training program: the library's, the application's own, and how --help groups them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.config.checkpointing import CheckpointConfig
from megatron.training.config.data import DataConfig, FinetuningDataConfig, StorageClientConfig, TokenizerConfig
from megatron.training.config.distributed import DistributedConfig
from megatron.training.config.families import (
    BiencoderConfig,
    ExportConfig,
    InferenceConfig,
    RetroConfig,
    VisionLanguageConfig,
)
from megatron.training.config.logging import LoggingConfig
from megatron.training.config.model import (
    ConfigurationConfig,
    ExperimentalConfig,
    ExpertConfig,
    HeadConfig,
    HeterogeneousConfig,
    NetworkSizeConfig,
    TransformerEngineConfig,
)
from megatron.training.config.schedule import LearningRateConfig, RegularizationConfig
from megatron.training.config.training import (
    InitializationConfig,
    MixedPrecisionConfig,
    RerunConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.training.config.vendor import NoEffectConfig, ReplacedConfig


@dataclass(frozen=True)
class FlagGroup:
    """One heading of --help: all fields of `own`, and the fields of library classes named in `library`."""

    title: str
    own: type | None = None
    library: dict[type, str] = field(default_factory=dict)
    hidden: bool = False

    def members(self) -> Iterator[tuple[type, str]]:
        """The group's fields, each with the class that owns it."""
        for owner, names in self.library.items():
            for name in names.split():
                yield owner, name
        if self.own is not None:
            for own_field in fields(self.own):
                yield self.own, own_field.name


FLAG_GROUPS: tuple[FlagGroup, ...] = (
    FlagGroup(
        "network size",
        NetworkSizeConfig,
        {
            TransformerConfig: """
                num_layers hidden_size ffn_hidden_size num_attention_heads attention_backend kv_channels
                num_query_groups softmax_scale rotary_interleaved no_rope_freq mrope_section normalization
                layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
                multi_latent_attention mtp_num_layers mtp_loss_scaling_factor window_size
                yarn_rotary_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
                yarn_mscale yarn_mscale_all_dim
            """
        },
    ),
    FlagGroup(
        "regularization",
        RegularizationConfig,
        {
            TransformerConfig: "attention_dropout hidden_dropout",
            OptimizerConfig: """
                weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum muon_momentum muon_use_nesterov
                muon_num_ns_steps muon_scale_mode muon_extra_scale_factor
            """,
        },
    ),
    FlagGroup(
        "training",
        TrainingConfig,
        {
            TransformerConfig: """
                recompute_granularity recompute_method recompute_num_layers recompute_modules
                distribute_saved_activations clone_scatter_output_in_embedding use_cpu_initialization
                deterministic_mode calculate_per_token_loss add_bias_linear add_qkv_bias
                masked_softmax_fusion bias_dropout_fusion apply_rope_fusion cross_entropy_loss_fusion
                cross_entropy_fusion_impl persist_layer_norm gradient_accumulation_fusion
                async_tensor_model_parallel_allreduce sequence_parallel pipeline_model_parallel_comm_backend
                tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
                tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_split_ag tp_comm_split_rs
                tp_comm_bootstrap_backend
                torch_compile cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
            """,
            DistributedDataParallelConfig: "check_for_nan_in_grad check_for_large_grads",
            OptimizerConfig: """
                optimizer optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
                overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
            """,
        },
    ),
    FlagGroup("initialization", InitializationConfig, {TransformerConfig: "init_method_std"}),
    FlagGroup("learning rate", LearningRateConfig, {OptimizerConfig: "lr min_lr decoupled_lr decoupled_min_lr"}),
    FlagGroup("checkpointing", CheckpointConfig, {TransformerConfig: "perform_initialization"}),
    FlagGroup(
        "mixed precision",
        MixedPrecisionConfig,
        {
            TransformerConfig: """
                fp16 bf16 fp32_residual_connection apply_query_key_layer_scaling attention_softmax_in_fp32
                disable_bf16_reduced_precision_matmul
            """,
            OptimizerConfig: "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
            DistributedDataParallelConfig: "grad_reduce_in_fp32 reuse_grad_buf_for_mxfp8_param_ag",
        },
    ),
    FlagGroup(
        "distributed",
        DistributedConfig,
        {
            TransformerConfig: """
                tensor_model_parallel_size pipeline_model_parallel_size pipeline_model_parallel_split_rank
                context_parallel_size
                num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
                account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
                pipeline_model_parallel_layout pipeline_schedule microbatch_group_size_per_vp_stage
                overlap_p2p_comm overlap_p2p_comm_warmup_flush defer_embedding_wgrad_compute
                wgrad_deferral_limit init_model_with_meta_device cp_comm_type
                hierarchical_context_parallel_sizes
            """,
            DistributedDataParallelConfig: """
                use_distributed_optimizer overlap_grad_reduce overlap_param_gather align_param_gather
                bucket_size pad_buckets_for_high_nccl_busbw average_in_collective
                num_distributed_optimizer_instances use_custom_fsdp data_parallel_sharding_strategy
                gradient_reduce_div_fusion fsdp_double_buffer suggested_communication_unit_size
                keep_fp8_transpose_cache_when_using_custom_fsdp nccl_ub
            """,
            OptimizerConfig: "overlap_param_gather_with_optimizer_step",
        },
    ),
    FlagGroup("validation", ValidationConfig, {TransformerConfig: "test_mode"}),
    FlagGroup("data and dataloader", DataConfig),
    FlagGroup("tokenizer", TokenizerConfig),
    FlagGroup(
        "logging",
        LoggingConfig,
        {OptimizerConfig: "log_num_zeros_in_grad", TransformerConfig: "barrier_with_L1_time"},
    ),
    FlagGroup(
        "moe",
        ExpertConfig,
        {
            TransformerConfig: """
                num_moe_experts expert_model_parallel_size expert_tensor_parallel_size moe_layer_freq
                moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap
                moe_grouped_gemm moe_layer_recompute moe_router_load_balancing_type moe_router_dtype
                moe_router_score_function moe_router_topk moe_router_pre_softmax moe_router_num_groups
                moe_router_group_topk moe_router_topk_scaling_factor moe_router_enable_expert_bias
                moe_router_bias_update_rate moe_router_force_load_balancing moe_router_padding_for_fp8
                moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_per_layer_logging
                moe_token_dispatcher_type moe_enable_deepep moe_deepep_num_sms moe_permute_fusion
                moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
                moe_apply_probs_on_input delay_wgrad_compute
            """
        },
    ),
    FlagGroup(
        "mla",
        None,
        {
            MLATransformerConfig: """
                q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor
                mscale mscale_all_dim
            """
        },
    ),
    FlagGroup("heterogeneous architecture", HeterogeneousConfig),
    FlagGroup(
        "Transformer-Engine",
        TransformerEngineConfig,
        {
            TransformerConfig: """
                fp8 fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
                first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
                use_te_rng_tracker inference_rng_tracker
            """,
            DistributedDataParallelConfig: "fp8_param_gather",
        },
    ),
    FlagGroup(
        "experimental",
        ExperimentalConfig,
        {
            TransformerConfig: """
                is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
                use_mamba_mem_eff_path
            """,
            OptimizerConfig: """
                use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype
                exp_avg_sq_dtype
            """,
        },
    ),
    FlagGroup("configuration", ConfigurationConfig),
    FlagGroup(
        "inference",
        InferenceConfig,
        {
            TransformerConfig: """
                flash_decode enable_cuda_graph cuda_graph_warmup_steps external_cuda_graph cuda_graph_scope
                symmetric_ar_type mlp_chunks_for_prefill
            """
        },
    ),
    FlagGroup("biencoder", BiencoderConfig),
    FlagGroup("vision", HeadConfig, {TransformerConfig: "qk_layernorm"}),
    FlagGroup("retro", RetroConfig),
    FlagGroup("config logger", None, {TransformerConfig: "config_logger_dir"}),
    FlagGroup("rerun engine", RerunConfig),
    FlagGroup("sft", FinetuningDataConfig),
    FlagGroup("pretrain_gpt.py when modelopt installed: modelopt-generic", ExportConfig),
    FlagGroup("pretrain_vlm.py: vision language model specific arguments", VisionLanguageConfig),
    FlagGroup("msc", StorageClientConfig, hidden=True),
    FlagGroup("replaced", ReplacedConfig, hidden=True),
    FlagGroup(
        "no effect",
        NoEffectConfig,
        {
            TransformerConfig: """
                use_ring_exchange_p2p moe_use_legacy_grouped_gemm moe_extended_tp fp8_interval
            """
        },
        hidden=True,
    ),
)
"""The headings of --help, in their order; hidden groups do not show."""
