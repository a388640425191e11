"""In which words each rule refuses."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.rules import (
    RULES,
    apply_rules,
    batch,
    checkpoint,
    data,
    layout,
    model,
    pipeline,
    precision,
    replaced,
    runtime,
    schedule,
    sharding,
)
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training.settings_for_tests import REAL_DATA, SAMPLES, SMALL_GPT, validated, varied

# --- refusals -------------------------------------------------------------------------------------

PRECISION_AWARE = "--use-distributed-optimizer --use-precision-aware-optimizer"

REFUSED: list[tuple[Any, str, str, str]] = [
    # rule, flags, what the message says, base command line
    (replaced.refuse_replaced_flags, "--batch-size 3", "use --micro-batch-size 3", SMALL_GPT),
    (replaced.refuse_replaced_flags, "--warmup 3", "use --lr-warmup-fraction", SMALL_GPT),
    (
        replaced.refuse_replaced_flags,
        "--model-parallel-size 2",
        "use --tensor-model-parallel-size 2",
        SMALL_GPT,
    ),
    (
        replaced.refuse_checkpoint_activations,
        "--checkpoint-activations",
        "use --recompute-activations",
        SMALL_GPT,
    ),
    (
        precision.require_precision_aware_optimizer_fits,
        "--use-precision-aware-optimizer",
        "needs --use-distributed-optimizer and --optimizer adam",
        SMALL_GPT,
    ),
    (
        precision.require_precision_aware_optimizer_fits,
        "--exp-avg-dtype bf16",
        "--exp-avg-dtype needs --use-precision-aware-optimizer",
        SMALL_GPT,
    ),
    (
        precision.require_precision_aware_optimizer_fits,
        f"{PRECISION_AWARE} --main-grads-dtype bf16",
        "--main-grads-dtype bf16 needs --bf16",
        SMALL_GPT,
    ),
    (
        precision.require_precision_aware_optimizer_fits,
        f"{PRECISION_AWARE} --main-params-dtype fp16",
        "fp32 weights are their own main weights",
        SMALL_GPT,
    ),
    (
        sharding.require_offloaded_optimizer_fits,
        "--optimizer-cpu-offload",
        "needs --use-precision-aware-optimizer",
        SMALL_GPT,
    ),
    (
        sharding.require_offloaded_optimizer_fits,
        f"{PRECISION_AWARE} --optimizer-cpu-offload --optimizer-offload-fraction 2",
        r"--optimizer-offload-fraction \(2.0\) must be between 0 and 1",
        SMALL_GPT,
    ),
    (
        runtime.require_communicators_available,
        "--nccl-communicator-config-path nowhere.yaml",
        "--nccl-communicator-config-path nowhere.yaml does not exist",
        SMALL_GPT,
    ),
    (
        runtime.require_communicators_available,
        "--high-priority-stream-groups dp_cp everything",
        "--high-priority-stream-groups dp_cp everything: there is no process group 'everything'",
        SMALL_GPT,
    ),
    (
        runtime.require_communicators_available,
        "--high-priority-stream-groups dp_cp",
        "need NCCL as the backend, found gloo; leave them out",
        SMALL_GPT,
    ),
    (runtime.require_communicators_available, "--use-sharp", "needs NCCL on a network that reduces", SMALL_GPT),
    (
        runtime.require_cuda_for_its_settings,
        "--empty-unused-memory-level 2",
        "this run computes on the CPU, where none is cached",
        SMALL_GPT,
    ),
    (
        runtime.require_cuda_for_its_settings,
        "--record-memory-history",
        "records allocations on CUDA devices, found cpu",
        SMALL_GPT,
    ),
    (
        runtime.require_cuda_for_its_settings,
        "--log-energy",
        "--log-energy: energy is counted by NVIDIA's driver, and this run computes on cpu",
        SMALL_GPT,
    ),
    (checkpoint.require_save_interval, "--save x", "--save x needs --save-interval", SMALL_GPT),
    (
        checkpoint.require_dist_format_without_gloo,
        "--use-distributed-optimizer --disable-gloo-process-groups --ckpt-format torch",
        "needs --ckpt-format torch_dist",
        SMALL_GPT,
    ),
    (
        runtime.require_timeline_within_run,
        "--timeline x --timeline-step 2 11",
        r"--timeline-step 2 11: iterations from 1 to --train-iters \(10\) can be recorded",
        SMALL_GPT,
    ),
    (
        layout.require_world_fits_layout,
        "--tensor-model-parallel-size 2",
        r"1 processes \(WORLD_SIZE\) do not divide by --tensor-model-parallel-size 2 = 2",
        SMALL_GPT,
    ),
    (
        data.require_cache_for_object_storage,
        "--data-path s3://bucket/text",
        "s3://bucket/text lies in object storage; --object-storage-cache-path names",
        REAL_DATA,
    ),
    (data.require_validation_sets, "--multiple-validation-sets", "needs the sets: name them", SMALL_GPT),
    (
        data.require_validation_sets,
        "--full-validation --dataloader-type external",
        "--dataloader-type external has none",
        SMALL_GPT,
    ),
    (checkpoint.require_expressible, "--hf-model-type llama", "has no effect without --save-hf", SMALL_GPT),
    (layout.require_world_fits_layout, "--pipeline-model-parallel-size 0", "must be at least 1", SMALL_GPT),
    (
        data.require_one_data_source,
        "--data-path a",
        "--data-path and --mock-data exclude each other",
        SMALL_GPT,
    ),
    (
        data.require_one_data_source,
        "--data-path a --train-data-path b",
        "--train-data-path exclude",
        REAL_DATA,
    ),
    (data.require_one_data_source, "--data-path a --data-args-path b", "--data-args-path exclude", REAL_DATA),
    (
        data.require_one_data_source,
        "--train-data-path a --per-split-data-args-path b",
        "--per-split-data-args-path exclude",
        REAL_DATA,
    ),
    (
        data.refuse_split_of_separate_data,
        "--train-data-path a --split 1,1,1",
        "--split 1,1,1 has no",
        REAL_DATA,
    ),
    (data.require_builder_threads, "--num-dataset-builder-threads 0", "must be positive", SMALL_GPT),
    (data.require_builder_threads, "--num-workers -1", "must not be negative", SMALL_GPT),
    (data.derive_sequence_length, "--encoder-seq-length 64", "mean the same; give one of them", SMALL_GPT),
    (data.derive_sequence_length, "--seq-length 0", "must be positive", SMALL_GPT),
    (
        data.require_positions_for_sequence,
        "--seq-length 256",
        r"--max-position-embeddings \(128\) is smaller than --seq-length \(256\)",
        SMALL_GPT,
    ),
    (
        data.require_tokenizer_files,
        "--tokenizer-type GPT2BPETokenizer",
        "GPT2BPETokenizer needs --vocab-file and --merge-file",
        SMALL_GPT,
    ),
    (
        data.require_tokenizer_files,
        "--tokenizer-type SentencePieceTokenizer",
        "SentencePieceTokenizer needs --tokenizer-model",
        SMALL_GPT,
    ),
    (data.require_conversations, "--sft", "--sft needs --tokenizer-type SFTTokenizer, found", SMALL_GPT),
    (
        data.require_conversations,
        "--sft --tokenizer-type SFTTokenizer --tokenizer-model a --eod-mask-loss",
        "--eod-mask-loss has no meaning with --sft",
        REAL_DATA,
    ),
    (data.require_tokenizer_files, "--vocab-extra-ids 5", "needs --tokenizer-type SentencePiece", SMALL_GPT),
    (batch.require_micro_batch_size, "--micro-batch-size 0", "is required and must be positive", SMALL_GPT),
    (batch.derive_global_batch_size, "--global-batch-size 0", "must be positive", SMALL_GPT),
    (
        batch.require_batch_divides_over_ranks,
        "--global-batch-size 3",
        r"must be divisible by 2, --micro",
        SMALL_GPT,
    ),
    (
        batch.require_batch_divides_over_ranks,
        "--global-batch-size 1 --decrease-batch-size-if-needed",
        "is less than one microbatch",
        SMALL_GPT,
    ),
    (batch.require_valid_rampup, "--rampup-batch-size 2 2", "three whole numbers", SAMPLES),
    (batch.require_valid_rampup, "--rampup-batch-size 2 two 10", "three whole numbers", SAMPLES),
    (batch.require_valid_rampup, "--rampup-batch-size 2 0 10", "must be positive", SAMPLES),
    (
        batch.require_valid_rampup,
        "--rampup-batch-size 4 3 10 --global-batch-size 8",
        "in whole increments",
        SAMPLES,
    ),
    (
        batch.require_valid_rampup,
        "--rampup-batch-size 3 5 10 --global-batch-size 8",
        "divisible by 2",
        SAMPLES,
    ),
    (batch.require_lengths_in_steps, "--train-samples 5", "it excludes --train-samples", SMALL_GPT),
    (batch.require_lengths_in_steps, "--lr-decay-samples 5", "use --lr-decay-iters", SMALL_GPT),
    (batch.require_lengths_in_steps, "--lr-warmup-samples 5", "use --lr-warmup-iters", SMALL_GPT),
    (
        batch.require_lengths_in_steps,
        "--rampup-batch-size 2 2 8 --global-batch-size 4",
        "needs --train-samples",
        SMALL_GPT,
    ),
    (
        batch.require_lengths_in_steps,
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
        "exclude each other; give one of them",
        SMALL_GPT,
    ),
    (batch.require_lengths_in_samples, "--lr-decay-iters 5", "use --lr-decay-samples", SAMPLES),
    (batch.require_lengths_in_samples, "--lr-warmup-iters 5", "use --lr-warmup-samples", SAMPLES),
    (
        batch.require_lengths_in_samples,
        "--lr-warmup-fraction 0.1 --lr-warmup-samples 2",
        "exclude each other",
        SAMPLES,
    ),
    (batch.require_positive_length, "--train-iters 0", "--skip-train only evaluates", SMALL_GPT),
    (
        sharding.require_bucket_settings_fit,
        "--ddp-num-buckets 2 --ddp-bucket-size 3",
        "exclude each",
        SMALL_GPT,
    ),
    (sharding.require_bucket_settings_fit, "--ddp-num-buckets 0", "must be positive", SMALL_GPT),
    (precision.derive_params_dtype, "--fp16 --bf16", "--fp16 and --bf16 exclude each other", SMALL_GPT),
    (
        precision.derive_gradient_dtype,
        "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
        "exclude each other",
        SMALL_GPT,
    ),
    (
        precision.require_half_precision_for_its_options,
        "--fp16-lm-cross-entropy",
        "--fp16-lm-cross-entropy needs --fp16",
        SMALL_GPT,
    ),
    (
        precision.require_half_precision_for_its_options,
        "--fp32-residual-connection",
        "--fp32-residual-connection needs --fp16 or --bf16",
        SMALL_GPT,
    ),
    (
        precision.require_deterministic_kernels,
        "--deterministic-mode --cross-entropy-loss-fusion",
        "does not work with --cross-entropy-loss-fusion",
        SMALL_GPT,
    ),
    (model.derive_num_layers, "--encoder-num-layers 3", "mean the same", SMALL_GPT),
    (
        model.require_model_sizes,
        "",
        "--hidden-size, --num-attention-heads, --max-position-embeddings missing",
        "--num-layers 2 --micro-batch-size 1",
    ),
    (model.require_model_sizes, "--num-layers 0", r"--num-layers \(0\) must be positive", SMALL_GPT),
    (model.derive_kv_channels, "--hidden-size 65", r"--hidden-size \(65\) must be divisible", SMALL_GPT),
    (model.require_heads_fit, "--group-query-attention --num-query-groups 3", "must be divisible", SMALL_GPT),
    (model.require_heads_fit, "--num-query-groups 2", "needs --group-query-attention", SMALL_GPT),
    (model.require_latent_settings, "--kv-lora-rank 8", "only --multi-latent-attention reads that", SMALL_GPT),
    (
        model.require_latent_settings,
        "--multi-latent-attention --group-query-attention --num-query-groups 2",
        "has no groups of heads",
        SMALL_GPT,
    ),
    (
        model.require_latent_settings,
        "--multi-latent-attention --position-embedding-type rope --use-rope-scaling",
        "--use-rope-scaling would do nothing",
        SMALL_GPT,
    ),
    (
        model.require_further_prediction_fits,
        "--mtp-loss-scaling-factor 0.3",
        "needs --mtp-num-layers",
        SMALL_GPT,
    ),
    (model.require_one_activation, "--swiglu --squared-relu", "exclude each other", SMALL_GPT),
    (
        model.imply_rope,
        "--use-rotary-position-embeddings --position-embedding-type none",
        "exclude each other",
        SMALL_GPT,
    ),
    (
        model.require_interleaved_rope_fits,
        "--rotary-interleaved --position-embedding-type rope",
        "--rotary-interleaved needs --no-rope-fusion",
        SMALL_GPT,
    ),
    (
        model.require_rope_without_positions,
        "--no-position-embedding",
        "needs --position-embedding-type",
        SMALL_GPT,
    ),
    (
        model.require_position_settings,
        "--position-embedding-type yarn",
        "needs --yarn-rotary-scaling-factor",
        SMALL_GPT,
    ),
    (
        model.require_position_settings,
        "--yarn-rotary-scaling-factor 4",
        "need --position-embedding-type yarn",
        SMALL_GPT,
    ),
    (
        model.require_position_settings,
        "--use-rope-scaling",
        "needs --position-embedding-type rope",
        SMALL_GPT,
    ),
    (model.require_position_settings, "--rotary-percent 0", "must be above 0", SMALL_GPT),
    (
        model.choose_flash_attention,
        "--use-flash-attn",
        "needs a CUDA device and the package flash-attn",
        SMALL_GPT,
    ),
    (
        model.choose_flash_attention,
        "--use-flash-attn --attention-backend unfused",
        "--attention-backend unfused exclude each other",
        SMALL_GPT,
    ),
    (
        schedule.require_ordered_learning_rates,
        "--min-lr 1",
        r"--min-lr \(1.0\) must not exceed --lr",
        SMALL_GPT,
    ),
    (schedule.require_ordered_learning_rates, "--min-lr -1", "must not be negative", SMALL_GPT),
    (schedule.require_ordered_learning_rates, "--lr-warmup-init 1", "must not exceed --lr", SMALL_GPT),
    (
        schedule.require_ordered_learning_rates,
        "--decoupled-lr 1 --decoupled-min-lr 2",
        "must not exceed --decoupled-lr",
        SMALL_GPT,
    ),
    (
        schedule.require_warmup_within_decay,
        "--lr-warmup-iters 10",
        "must be below --lr-decay-iters",
        SMALL_GPT,
    ),
    (schedule.require_warmup_within_decay, "--lr-warmup-fraction 1", "and below 1", SMALL_GPT),
    (schedule.require_warmup_within_decay, "--lr-decay-iters 0", "must be positive", SMALL_GPT),
    (schedule.require_length_of_last_decay, "--lr-decay-style WSD", "needs --lr-wsd-decay-iters", SMALL_GPT),
    (schedule.require_length_of_last_decay, "--lr-decay-style WSD", "needs --lr-wsd-decay-samples", SAMPLES),
    (schedule.derive_weight_decay, "--start-weight-decay 1", "needs --weight-decay-incr-style", SMALL_GPT),
    (
        schedule.derive_weight_decay,
        "--weight-decay-incr-style linear",
        "needs --start-weight-decay",
        SMALL_GPT,
    ),
    (
        schedule.derive_weight_decay,
        "--weight-decay-incr-style cosine --start-weight-decay 2 --end-weight-decay 1",
        "must rise",
        SMALL_GPT,
    ),
    (
        schedule.require_one_source_of_schedule,
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
        "exclude each other",
        SMALL_GPT,
    ),
    (
        schedule.require_complete_recompute,
        "--distribute-saved-activations",
        "needs --tensor-model-parallel-size above 1",
        SMALL_GPT,
    ),
    (
        schedule.require_complete_recompute,
        "--recompute-activations --recompute-method uniform",
        "needs --recompute-granularity full",
        SMALL_GPT,
    ),
    (runtime.require_positive_seed, "--seed 0", "must be a positive whole number", SMALL_GPT),
    (
        runtime.require_sensible_intervals,
        "--log-interval 0",
        r"--log-interval \(0\) must be positive",
        SMALL_GPT,
    ),
    (runtime.require_sensible_intervals, "--manual-gc-interval -1", "must not be negative", SMALL_GPT),
    (
        runtime.require_profile_window,
        "--profile --profile-step-start 5 --profile-step-end 5",
        "must be above --profile-step-start",
        SMALL_GPT,
    ),
    (
        schedule.require_offloading_fits,
        "--cpu-offloading",
        "needs --cpu-offloading-num-layers of at least 1",
        SMALL_GPT,
    ),
    (runtime.require_named_wandb_run, "--wandb-project p", "needs --wandb-exp-name", SMALL_GPT),
]


def refused_ids() -> list[str]:
    return [f"{rule.__name__}: {flags}" for rule, flags, _, _ in REFUSED]


@pytest.mark.parametrize("rule, flags, message, base", REFUSED, ids=refused_ids())
def test_refusal(rule: Any, flags: str, message: str, base: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        validated(flags, base=base)


SEVERAL_RANKS = [
    (
        pipeline.require_microbatches_for_interleaving,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2",
        2,
        r"1 microbatch \(.* 2 microbatches would work, --global-batch-size 4",
    ),
    (
        pipeline.derive_chunks_from_layout,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E(tt|)*2L",
        2,
        "has 3 stages, which do not divide by --pipeline-model-parallel-size 2",
    ),
    (
        "library",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tL",
        2,
        "--pipeline-model-parallel-layout .* has 3 transformer layers",
    ),
    (
        pipeline.require_deferral_fits,
        "--pipeline-model-parallel-size 2 --defer-embedding-wgrad-compute --no-gradient-accumulation-fusion",
        2,
        "--defer-embedding-wgrad-compute excludes --no-gradient-accumulation-fusion",
    ),
    (pipeline.require_deferral_fits, "--defer-embedding-wgrad-compute", 1, "needs --pipeline-model-parallel-size"),
    (pipeline.require_deferral_fits, "--wgrad-deferral-limit 2", 1, "needs --defer-embedding-wgrad-compute"),
    (
        pipeline.require_overlap_for_warmup_flush,
        "--pipeline-model-parallel-size 2 --overlap-p2p-communication-warmup-flush",
        2,
        "--overlap-p2p-communication-warmup-flush needs several model chunks",
    ),
    (
        pipeline.require_layers_fit_stages,
        "--pipeline-model-parallel-size 3",
        3,
        r"--num-layers 4 \(counted as 4\) does not divide by --pipeline-model-parallel-size 3",
    ),
    (
        pipeline.require_layers_fit_stages,
        "--pipeline-model-parallel-size 2 --account-for-loss-in-pipeline-split",
        2,
        "counted as 5",
    ),
    (
        data.require_sequence_divides_over_ranks,
        "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 126",
        4,
        r"--seq-length \(126\) must be divisible by 4 for --sequence-parallel",
    ),
    (
        model.require_heads_fit,
        "--tensor-model-parallel-size 8",
        8,
        r"--num-attention-heads \(4\) must be div",
    ),
    (
        model.require_heads_fit,
        "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2",
        4,
        r"--num-query-groups \(2\) must be divisible by --tensor-model-parallel-size \(4\)",
    ),
    (
        layout.require_world_fits_layout,
        "--tensor-model-parallel-size 2",
        3,
        "start a multiple of 2 processes",
    ),
    (
        "library",
        "--tensor-model-parallel-size 4 --ffn-hidden-size 130",
        4,
        r"--ffn-hidden-size \(130\) must be divisible by --tensor-model-parallel-size \(4\)",
    ),
    (
        "library",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4",
        2,
        "--decoder-first-pipeline-num-layers",
    ),
    (
        "library",
        "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 1",
        3,
        r"--num-layers \(4\) and --decoder-first-pipeline-num-layers \(1\)",
    ),
]


@pytest.mark.parametrize("rule, flags, world_size, message", SEVERAL_RANKS)
def test_refusal_on_several_ranks(rule: Any, flags: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        validated(flags, world_size=world_size)


UNBUILT: list[tuple[Any, dict[str, Any], str]] = [
    (checkpoint.require_conversion_paths, {"ckpt_convert_format": "torch"}, "needs --load"),
    (
        checkpoint.require_place_of_local_checkpoints,
        {"non_persistent_ckpt_type": "local"},
        "needs --non-persistent-local-ckpt-dir",
    ),
    (checkpoint.require_fsdp_for_torch_dcp, {"ckpt_format": "torch_dcp"}, "needs --use-torch-fsdp2"),
    (
        checkpoint.require_dist_format_for_async_save,
        {"async_save": True, "ckpt_format": "torch"},
        "needs --ckpt-format torch_dist",
    ),
    (checkpoint.require_known_retention, {"save_keep_last": 0}, "at least one"),
    (checkpoint.require_known_retention, {"save_interval": 3, "save_retain_interval": 4}, "must be a multiple"),
    (
        checkpoint.require_non_persistent_place,
        {"non_persistent_save_interval": 4},
        "needs --non-persistent-ckpt-type and --save",
    ),
    (checkpoint.require_replication_fits, {"replication": True}, "needs --replication-jump"),
    (
        checkpoint.require_replication_fits,
        {"replication": True, "replication_jump": 2},
        "needs --non-persistent-ckpt-type local",
    ),
    (
        checkpoint.require_replication_fits,
        {"replication": True, "replication_jump": 3, "non_persistent_ckpt_type": "local", "world_size": 8},
        "must divide the 8 ranks",
    ),
    (checkpoint.prepare_upcycling, {"moe_use_upcycling": True}, "needs --save"),
    (
        layout.require_context_groups_fit,
        {"hierarchical_context_parallel_sizes": [2, 2], "context_parallel_size": 2},
        "multiply to 4, but --context-parallel-size is 2",
    ),
    (layout.require_context_groups_fit, {"cp_comm_type": ["a2a+p2p"]}, "needs --hierarchical"),
    (
        layout.require_saved_vocabulary_fits_ranks,
        {"padded_vocab_size": 101, "tensor_model_parallel_size": 2},
        r"the checkpoint's padded vocabulary \(101\) must be divisible",
    ),
    (layout.require_sequence_parallel_for_overlap, {"tp_comm_overlap": True}, "needs --sequence-parallel"),
    (
        pipeline.require_one_way_to_chunks,
        {"num_layers_per_virtual_pipeline_stage": 1, "num_virtual_stages_per_pipeline_rank": 2},
        "exclude each other",
    ),
    (
        pipeline.derive_chunks_from_layout,
        {"pipeline_model_parallel_layout": "Et|tt|tL", "pipeline_model_parallel_size": 2},
        "has 3 stages",
    ),
    (
        pipeline.derive_chunks_from_layer_count,
        {"num_layers_per_virtual_pipeline_stage": 3, "pipeline_model_parallel_size": 2},
        "do not divide over --pipeline-model-parallel-size 2 into chunks",
    ),
    (
        pipeline.derive_chunks_from_layer_count,
        {"num_layers_per_virtual_pipeline_stage": 1, "decoder_first_pipeline_num_layers": 1},
        "use --num-virtual-stages-per-pipeline-rank",
    ),
    (
        pipeline.require_stages_for_chunks,
        {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
        "of at least 2, found 1",
    ),
    (
        pipeline.derive_chunks_of_schedule,
        {"pipeline_schedule": "zb-h1", "pipeline_model_parallel_size": 1},
        "--pipeline-schedule zb-h1 needs --pipeline-model-parallel-size of at least 2",
    ),
    (
        pipeline.derive_chunks_of_schedule,
        {
            "pipeline_schedule": "1f1b",
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
        "--pipeline-schedule 1f1b needs one model chunk on each rank .*, found 2",
    ),
    (
        pipeline.derive_chunks_of_schedule,
        {
            "pipeline_schedule": "zb-v",
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 4,
        },
        r"--pipeline-schedule zb-v needs 2 model chunks on each rank \(its default\), found 4",
    ),
    (
        pipeline.derive_chunks_of_schedule,
        {"pipeline_schedule": "interleaved", "pipeline_model_parallel_size": 2},
        "needs several model chunks on each rank .*, found 1",
    ),
    (
        pipeline.require_layers_on_every_rank,
        {"pipeline_model_parallel_layout": "Ett|||ttL", "pipeline_model_parallel_size": 4},
        "leaves nothing to pipeline rank 1, 2; every one of the 4 ranks needs",
    ),
    (
        pipeline.require_layers_fit_chunks,
        {"virtual_pipeline_model_parallel_size": 3, "pipeline_model_parallel_size": 2, "num_layers": 8},
        "8 layers do not divide by 2 x 3, .* numbers that divide: 1, 2, 4; --pipeline-model-parallel-layout",
    ),
    (
        pipeline.require_microbatches_for_interleaving,
        {
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "global_batch_size": 6,
            "micro_batch_size": 2,
        },
        "3 microbatches .* no turn may have fewer than the 4 stages; 4 microbatches would work, --global-batch-size 8",
    ),
    (
        pipeline.require_microbatches_for_interleaving,
        {
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "microbatch_group_size_per_vp_stage": 6,
            "global_batch_size": 27,
            "micro_batch_size": 1,
            "data_parallel_size": 3,
        },
        "9 microbatches .*; 6 microbatches or 10 microbatches would work, --global-batch-size 18 or 30",
    ),
    (
        pipeline.require_microbatches_for_interleaving,
        {
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "rampup_batch_size": ["2", "1", "100"],
        },
        "3 microbatches .* would work",
    ),
    (
        pipeline.require_microbatches_for_interleaving,
        {
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "microbatch_group_size_per_vp_stage": 3,
        },
        r"--microbatch-group-size-per-virtual-pipeline-stage \(3\) must be at least --pipeline-model-parallel-size",
    ),
    (
        data.require_sequence_divides_over_ranks,
        {"context_parallel_size": 4, "seq_length": 12},
        "must be divisible by 8, twice --context-parallel-size",
    ),
    (
        sharding.require_instances_fit,
        {"num_distributed_optimizer_instances": 2},
        "needs --use-distributed-optimizer",
    ),
    (
        sharding.require_instances_fit,
        {"num_distributed_optimizer_instances": 4, "use_distributed_optimizer": True, "data_parallel_size": 6},
        "must divide the 6 data x context parallel ranks: use one of 1, 2, 3, 6",
    ),
    (
        sharding.require_overlap_param_gather_fits,
        {"overlap_param_gather": True},
        "needs --use-distributed-optimizer and --overlap-grad-reduce",
    ),
    (
        sharding.require_overlap_param_gather_fits,
        {"overlap_param_gather_with_optimizer_step": True},
        "and --ckpt-format torch",
    ),
    (
        sharding.require_torch_fsdp_fits,
        {"use_torch_fsdp2": True, "fp16": True},
        "does not work with fused gradients .*--fp16",
    ),
    (sharding.require_custom_fsdp_fits, {"use_custom_fsdp": True}, "needs --use-distributed-optimizer"),
    (
        sharding.require_custom_fsdp_fits,
        {
            "use_custom_fsdp": True,
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads",
        },
        "optim_grads is not built: use optim, or optim_grads_params",
    ),
    (
        sharding.require_custom_fsdp_fits,
        {"use_custom_fsdp": True, "use_distributed_optimizer": True},
        "no_shard shards nothing: leave both out",
    ),
    (
        sharding.require_custom_fsdp_fits,
        {
            "use_custom_fsdp": True,
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
        },
        "needs --no-gradient-accumulation-fusion",
    ),
    (
        sharding.require_custom_fsdp_fits,
        {
            "use_custom_fsdp": True,
            "use_distributed_optimizer": True,
            "gradient_accumulation_fusion": False,
            "check_weight_hash_across_dp_replicas_interval": 2,
            "data_parallel_sharding_strategy": "optim_grads_params",
        },
        "compares whole weights",
    ),
    (sharding.require_fp8_gather_fits, {"fp8_param_gather": True}, "needs --use-distributed-optimizer"),
    (model.require_position_settings, {"position_embedding_type": "mrope"}, "needs --mrope-section"),
    (model.derive_num_experts, {"num_experts": 2, "spec": ["local"]}, "--spec exclude each other"),
    (model.require_experts_fit_ranks, {"expert_model_parallel_size": 2}, "needs --num-experts"),
    (
        model.require_experts_fit_ranks,
        {"expert_model_parallel_size": 2, "num_experts": 3},
        r"--num-experts \(3\) must be divisible",
    ),
    (
        model.require_experts_fit_ranks,
        {"expert_model_parallel_size": 2, "num_experts": 2, "fp16": True},
        "use --bf16",
    ),
    (
        model.require_further_prediction_fits,
        {"mtp_num_layers": 1},
        "needs --position-embedding-type rope, yarn, none, found learned_absolute",
    ),
    (runtime.require_graphs_fit, {"external_cuda_graph": True}, "needs --te-rng-tracker"),
    (
        runtime.require_inference_settings_fit,
        {"inference_batch_times_seqlen_threshold": 5},
        "needs --pipeline-model-parallel-size above 1",
    ),
    (
        runtime.require_inference_settings_fit,
        {"inference_dynamic_batching": True, "inference_dynamic_batching_chunk_size": 100},
        "must be a multiple of 256",
    ),
]


@pytest.mark.parametrize("rule, values, message", UNBUILT)
def test_refusal_behind_an_unbuilt_capability(rule: Any, values: dict[str, Any], message: str) -> None:
    args = varied(**values)
    with pytest.raises(ConfigurationError, match=message):
        apply_rules(args, (rule,))


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match="--torch-compile needs a C.. compiler: no-such-compiler"):
        apply_rules(varied(torch_compile=True), (runtime.require_compiler,))


def test_every_rule_that_refuses_is_tested() -> None:
    tested = {row[0] for table in (REFUSED, SEVERAL_RANKS, UNBUILT) for row in table}
    elsewhere = {
        "refuse_capabilities_not_built",  # test_capabilities.py
        "require_load_for_checkpoint_args",  # test_checkpoint_arguments.py
        "require_what_an_encoder_can_do",  # functional_tests/test_pretrain_bert.py
        "require_positions_of_family",  # functional_tests/test_pretrain_t5.py
        "require_masked_samples",  # test_family_rules.py
        "require_buckets_of_distances",  # test_family_rules.py
        "require_spec",  # functional_tests/test_mamba.py, and so are the next three
        "require_fitting_layers",
        "require_shareable_heads",
        "require_what_a_recurrence_can_do",
        "require_compiler",  # test_compilation_without_a_compiler, which changes the environment
        "require_valid_library_configs",  # the rows with "library"
    }
    refusing = {rule for rule in RULES if rule.__name__.startswith(("require_", "refuse_"))}
    assert {rule.__name__ for rule in refusing - tested} == elsewhere


def test_rules_have_reasons_and_names_of_their_own() -> None:
    names = [rule.__name__ for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(rule.__doc__ for rule in RULES)


def test_message_of_the_library_speaks_of_flags() -> None:
    with pytest.raises(ConfigurationError, match=r"--hidden-dropout \(2.0\) must be at least 0 and below 1"):
        validated("--hidden-dropout 2")


@pytest.mark.parametrize(
    "base, message",
    [
        (SMALL_GPT.replace("--train-iters 10", ""), "give --train-iters or --train-samples"),
        (SMALL_GPT.replace("--lr 1e-3", ""), "--lr, the peak learning rate, is required"),
        (SMALL_GPT.replace("--seq-length 128", ""), "--seq-length, the tokens per sample, is required"),
    ],
)
def test_training_needs_a_length_and_a_rate(base: str, message: str) -> None:
    validate_args(parse_args(argv=base.split()))  # fine for a program that does not train
    with pytest.raises(ConfigurationError, match=message):
        validate_args(parse_args(argv=base.split()), for_training=True)
