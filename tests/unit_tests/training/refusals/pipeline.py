"""Refusals of the rules about pipelines."""

from __future__ import annotations

from megatron.training.rules import pipeline
from tests.unit_tests.training.refusals.refusal import Refusal

REFUSALS = [
    Refusal(
        pipeline.require_microbatches_for_interleaving,
        r"1 microbatch \(.* 2 microbatches would work, --global-batch-size 4",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2",
        world_size=2,
    ),
    Refusal(
        pipeline.derive_chunks_from_layout,
        "has 3 stages, which do not divide by --pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E(tt|)*2L",
        world_size=2,
    ),
    Refusal(
        pipeline.require_deferral_fits,
        "--defer-embedding-wgrad-compute excludes --no-gradient-accumulation-fusion",
        "--pipeline-model-parallel-size 2 --defer-embedding-wgrad-compute --no-gradient-accumulation-fusion",
        world_size=2,
    ),
    Refusal(pipeline.require_deferral_fits, "needs --pipeline-model-parallel-size", "--defer-embedding-wgrad-compute"),
    Refusal(pipeline.require_deferral_fits, "needs --defer-embedding-wgrad-compute", "--wgrad-deferral-limit 2"),
    Refusal(
        pipeline.require_overlap_for_warmup_flush,
        "--overlap-p2p-communication-warmup-flush needs several model chunks",
        "--pipeline-model-parallel-size 2 --overlap-p2p-communication-warmup-flush",
        world_size=2,
    ),
    Refusal(
        pipeline.require_layers_fit_stages,
        r"--num-layers 4 \(counted as 4\) does not divide by --pipeline-model-parallel-size 3",
        "--pipeline-model-parallel-size 3",
        world_size=3,
    ),
    Refusal(
        pipeline.require_layers_fit_stages,
        "counted as 5",
        "--pipeline-model-parallel-size 2 --account-for-loss-in-pipeline-split",
        world_size=2,
    ),
    Refusal(
        pipeline.require_one_way_to_chunks,
        "exclude each other",
        values={"num_layers_per_virtual_pipeline_stage": 1, "num_virtual_stages_per_pipeline_rank": 2},
    ),
    Refusal(
        pipeline.derive_chunks_from_layout,
        "has 3 stages",
        values={"pipeline_model_parallel_layout": "Et|tt|tL", "pipeline_model_parallel_size": 2},
    ),
    Refusal(
        pipeline.derive_chunks_from_layer_count,
        "do not divide over --pipeline-model-parallel-size 2 into chunks",
        values={"num_layers_per_virtual_pipeline_stage": 3, "pipeline_model_parallel_size": 2},
    ),
    Refusal(
        pipeline.derive_chunks_from_layer_count,
        "use --num-virtual-stages-per-pipeline-rank",
        values={"num_layers_per_virtual_pipeline_stage": 1, "decoder_first_pipeline_num_layers": 1},
    ),
    Refusal(
        pipeline.require_stages_for_chunks,
        "of at least 2, found 1",
        values={"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
    ),
    Refusal(
        pipeline.derive_chunks_of_schedule,
        "--pipeline-schedule zb-h1 needs --pipeline-model-parallel-size of at least 2",
        values={"pipeline_schedule": "zb-h1", "pipeline_model_parallel_size": 1},
    ),
    Refusal(
        pipeline.derive_chunks_of_schedule,
        "--pipeline-schedule 1f1b needs one model chunk on each rank .*, found 2",
        values={
            "pipeline_schedule": "1f1b",
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    Refusal(
        pipeline.derive_chunks_of_schedule,
        r"--pipeline-schedule zb-v needs 2 model chunks on each rank \(its default\), found 4",
        values={
            "pipeline_schedule": "zb-v",
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 4,
        },
    ),
    Refusal(
        pipeline.derive_chunks_of_schedule,
        "needs several model chunks on each rank .*, found 1",
        values={"pipeline_schedule": "interleaved", "pipeline_model_parallel_size": 2},
    ),
    Refusal(
        pipeline.require_layers_on_every_rank,
        "leaves nothing to pipeline rank 1, 2; every one of the 4 ranks needs",
        values={"pipeline_model_parallel_layout": "Ett|||ttL", "pipeline_model_parallel_size": 4},
    ),
    Refusal(
        pipeline.require_layers_fit_chunks,
        "8 layers do not divide by 2 x 3, .* numbers that divide: 1, 2, 4; --pipeline-model-parallel-layout",
        values={"virtual_pipeline_model_parallel_size": 3, "pipeline_model_parallel_size": 2, "num_layers": 8},
    ),
    Refusal(
        pipeline.require_microbatches_for_interleaving,
        "3 microbatches .* no turn may have fewer than the 4 stages; 4 microbatches would work, --global-batch-size 8",
        values={
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "global_batch_size": 6,
            "micro_batch_size": 2,
        },
    ),
    Refusal(
        pipeline.require_microbatches_for_interleaving,
        "9 microbatches .*; 6 microbatches or 10 microbatches would work, --global-batch-size 18 or 30",
        values={
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "microbatch_group_size_per_vp_stage": 6,
            "global_batch_size": 27,
            "micro_batch_size": 1,
            "data_parallel_size": 3,
        },
    ),
    Refusal(
        pipeline.require_microbatches_for_interleaving,
        "3 microbatches .* would work",
        values={
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "rampup_batch_size": ["2", "1", "100"],
        },
    ),
    Refusal(
        pipeline.require_microbatches_for_interleaving,
        r"--microbatch-group-size-per-virtual-pipeline-stage \(3\) must be at least --pipeline-model-parallel-size",
        values={
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "microbatch_group_size_per_vp_stage": 3,
        },
    ),
]
