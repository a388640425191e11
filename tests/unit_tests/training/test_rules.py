"""What the rules derive, and the library objects made of the result."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch

from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import core_transformer_config_from_args, validate_args
from megatron.training.library_configs import bucket_size, ddp_config_from_args, optimizer_config_from_args
from megatron.training.rules import apply_rules, layout, model, pipeline, precision, runtime, sharding
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training.settings_for_tests import REAL_DATA, SAMPLES, parsed, validated, varied

# --- derived values -------------------------------------------------------------------------------

DERIVED: list[tuple[str, dict[str, Any]]] = [
    ("", {"params_dtype": torch.float32, "global_batch_size": 2, "data_parallel_size": 1, "kv_channels": 16}),
    ("", {"ffn_hidden_size": 256, "add_qkv_bias": True, "use_dist_ckpt": True, "dataloader_type": "single"}),
    ("--swiglu --hidden-size 128", {"ffn_hidden_size": 320}),  # 8/3 x 128 = 341, rounded down to 64s
    ("--bf16", {"params_dtype": torch.bfloat16, "accumulate_allreduce_grads_in_fp32": True}),
    ("--bf16 --grad-reduce-in-bf16", {"accumulate_allreduce_grads_in_fp32": False}),
    ("--fp16", {"params_dtype": torch.float16, "check_for_nan_in_loss_and_grad": False}),
    ("--fp16 --loss-scale 8", {"check_for_nan_in_loss_and_grad": True}),
    ("--recompute-activations", {"recompute_granularity": "selective"}),
    ("--disable-bias-linear", {"bias_gelu_fusion": False, "add_qkv_bias": False}),
    ("--use-rotary-position-embeddings", {"position_embedding_type": "rope", "apply_rope_fusion": True}),
    ("--position-embedding-type none", {"apply_rope_fusion": False}),
    ("--apply-query-key-layer-scaling", {"attention_softmax_in_fp32": True}),
    ("--weight-decay 0.5", {"start_weight_decay": 0.5, "end_weight_decay": 0.5}),
    ("--sequence-parallel", {"sequence_parallel": False}),
    ("", {"overlap_p2p_comm": False, "align_param_gather": False, "lr_decay_iters": 10}),
    ("--encoder-num-layers 4", {"num_layers": 4, "encoder_num_layers": 4}),
    ("", {"encoder_seq_length": 128, "encoder_num_layers": 4, "distributed_backend": "gloo"}),
    ("--ckpt-format torch", {"use_dist_ckpt": False}),
    ("--save run --save-interval 2", {"metrics_jsonl": "run/metrics.jsonl"}),
]


@pytest.mark.parametrize("flags, expected", DERIVED)
def test_derived_values(flags: str, expected: dict[str, Any]) -> None:
    args = validated(flags)
    assert {name: getattr(args, name) for name in expected} == expected


def test_no_experts_is_a_dense_model() -> None:
    args = varied(num_experts=0)
    apply_rules(args, (model.derive_num_experts,))
    assert args.num_experts is None


def test_shared_data_is_split_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        args = validated("--data-path x", base=REAL_DATA)
    assert args.split == "969, 30, 1"
    assert "--split is not given" in caplog.text


def test_world_divides_into_copies_of_the_model() -> None:
    args = validated("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", world_size=8)
    assert (args.data_parallel_size, args.global_batch_size, args.expert_tensor_parallel_size) == (2, 4, 2)


@pytest.mark.parametrize(
    "flags, iterations",
    [
        ("--global-batch-size 8", 12),
        ("--rampup-batch-size 4 4 16 --global-batch-size 8", 14),
        ("--rampup-batch-size 8 4 16 --global-batch-size 8", 12),
    ],
)
def test_steps_of_a_run_measured_in_samples(flags: str, iterations: int) -> None:
    args = validated(flags, base=SAMPLES)
    assert (args.train_iters, args.train_iters_given, args.lr_decay_samples) == (iterations, False, 100)


def test_checking_twice_changes_nothing() -> None:
    args = validated("--bf16 --swiglu --recompute-activations", base=SAMPLES)
    once = dict(vars(args))
    validate_args(args)
    assert vars(args) == once


@pytest.mark.parametrize(
    "values, chunks",
    [
        ({"num_layers_per_virtual_pipeline_stage": 1}, 2),
        ({"num_virtual_stages_per_pipeline_rank": 3}, 3),
        ({"pipeline_model_parallel_layout": "Et|t|t|tL"}, 2),
        ({"pipeline_model_parallel_layout": "Ett|ttL"}, None),
        ({"pipeline_model_parallel_layout": "E|(t|)*4,L"}, 3),
        ({"pipeline_schedule": "zb-v"}, 2),
    ],
)
def test_model_chunks_of_a_stage(values: dict[str, Any], chunks: int | None) -> None:
    args = varied(pipeline_model_parallel_size=2, **values)
    apply_rules(args, pipeline.PIPELINE_CHUNK_RULES[:5])
    assert args.virtual_pipeline_model_parallel_size == chunks


def test_sharded_gradients_are_overlapped() -> None:
    args = varied(data_parallel_sharding_strategy="optim_grads_params")
    apply_rules(args, (sharding.imply_overlap_of_sharding,))
    assert args.overlap_grad_reduce and args.overlap_param_gather


@pytest.mark.parametrize(("strategy", "fsdp2"), [("optim", False), ("optim_grads_params", True)])
def test_custom_fsdp_becomes_what_does_the_same_here(strategy: str, fsdp2: bool) -> None:
    args = varied(
        use_custom_fsdp=True,
        use_distributed_optimizer=True,
        data_parallel_sharding_strategy=strategy,
        gradient_accumulation_fusion=False,
        untie_embeddings_and_output_weights=True,
    )
    apply_rules(args, sharding.SHARDING_RULES)
    assert args.use_torch_fsdp2 is fsdp2 and args.use_distributed_optimizer is not fsdp2
    assert not args.use_custom_fsdp and args.data_parallel_sharding_strategy == "no_shard"
    assert not args.overlap_param_gather


# --- rules that depend on the device --------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for module in (layout, model, precision, runtime, sharding):
        monkeypatch.setattr(module, "device_type", lambda: "cuda")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    return monkeypatch


def test_cuda_keeps_nccl(on_cuda: pytest.MonkeyPatch) -> None:
    assert validated().distributed_backend == "nccl"


def test_cuda_gets_one_connection_where_collectives_follow_kernels(on_cuda: pytest.MonkeyPatch) -> None:
    validated("--tensor-model-parallel-size 2", world_size=2)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_other_number_of_connections_is_warned_of(
    on_cuda: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_cuda.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    with caplog.at_level(logging.WARNING):
        validated("--tensor-model-parallel-size 2", world_size=2)
    assert "CUDA_DEVICE_MAX_CONNECTIONS is 8" in caplog.text


def test_determinism_on_cuda_needs_an_algorithm(on_cuda: pytest.MonkeyPatch) -> None:
    on_cuda.delenv("NCCL_ALGO", raising=False)
    with pytest.raises(ConfigurationError, match="NCCL_ALGO to be one of Tree, Ring.*found None"):
        validated("--deterministic-mode")
    on_cuda.setenv("NCCL_ALGO", "Ring")
    validated("--deterministic-mode")


def test_fsdp_on_cuda_refuses_one_connection(on_cuda: pytest.MonkeyPatch) -> None:
    on_cuda.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = varied(use_custom_fsdp=True, use_distributed_optimizer=True, data_parallel_sharding_strategy="optim")
    with pytest.raises(ConfigurationError, match="CUDA_DEVICE_MAX_CONNECTIONS to be unset or above 1"):
        apply_rules(args, (sharding.require_custom_fsdp_fits,))


def test_flash_attention_is_a_backend(on_cuda: pytest.MonkeyPatch) -> None:
    on_cuda.setattr(model.importlib.util, "find_spec", lambda name: object())
    assert validated("--use-flash-attn").attention_backend is AttnBackend.flash


# --- objects of the library -----------------------------------------------------------------------


def test_transformer_config_of_settings() -> None:
    config = core_transformer_config_from_args(
        validated(
            "--norm-epsilon 1e-6 --apply-layernorm-1p --no-persist-layer-norm --swiglu --bf16 "
            "--window-size 8 0 --group-query-attention --num-query-groups 2 --cp-comm-type p2p"
        )
    )
    assert (config.layernorm_epsilon, config.layernorm_zero_centered_gamma) == (1e-6, True)
    assert not config.persist_layer_norm
    assert config.gated_linear_unit and config.bias_activation_fusion
    assert config.activation_func is torch.nn.functional.silu
    assert (config.window_size, config.num_query_groups, config.cp_comm_type) == ((8, 0), 2, "p2p")
    assert (config.params_dtype, config.pipeline_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (config.batch_p2p_comm, config.deallocate_pipeline_outputs) == (True, True)


def test_query_groups_need_their_switch() -> None:
    assert core_transformer_config_from_args(validated()).num_query_groups == 4


def test_squared_relu_of_settings() -> None:
    config = core_transformer_config_from_args(validated("--squared-relu"))
    x = torch.tensor([-2.0, 3.0])
    assert torch.equal(config.activation_func(x), torch.tensor([0.0, 9.0]))


def test_uneven_stages_of_settings() -> None:
    config = core_transformer_config_from_args(
        validated("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", world_size=2)
    )
    assert config.num_layers_in_first_pipeline_stage == 1


def test_xavier_initialiser_of_settings() -> None:
    config = core_transformer_config_from_args(validated("--init-method-xavier-uniform"))
    assert config.init_method is torch.nn.init.xavier_uniform_


def test_optimizer_config_of_settings() -> None:
    config = optimizer_config_from_args(validated("--optimizer sgd --clip-grad 0 --bf16 --min-lr 1e-4"))
    assert (config.optimizer, config.clip_grad, config.lr, config.min_lr) == ("sgd", 0.0, 1e-3, 1e-4)
    assert config.params_dtype is torch.bfloat16


def test_ddp_config_of_settings() -> None:
    args = validated("--bf16 --ddp-average-in-collective --ddp-bucket-size 5")
    config = ddp_config_from_args(args)
    assert config.grad_reduce_in_fp32 and config.average_in_collective and config.check_for_nan_in_grad
    assert config.bucket_size is None  # one bucket: nothing overlaps


@pytest.mark.parametrize(
    "values, size",
    [
        ({"ddp_bucket_size": 5}, 5),
        ({"ddp_num_buckets": 4}, 25),
        ({}, 40_000_000),
    ],
)
def test_size_of_overlapped_buckets(values: dict[str, Any], size: int) -> None:
    args = parsed().variant(overlap_grad_reduce=True, **values)
    assert bucket_size(args, 100, 2) == size


def test_overlap_of_tensor_parallel_communication() -> None:
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap --tp-comm-overlap-rs-dgrad"
    assert validated(flags, world_size=2).tp_comm_overlap
    with pytest.raises(ConfigurationError, match="--tp-comm-overlap needs --sequence-parallel"):
        validated(flags.replace("--sequence-parallel", ""), world_size=2)


def test_parts_of_an_overlap_that_is_off_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        validated("--tensor-model-parallel-size 2 --sequence-parallel --disable-tp-comm-overlap-ag", world_size=2)
    assert [record.message for record in caplog.records] == [
        "--disable-tp-comm-overlap-ag has no effect without --tp-comm-overlap"
    ]


def test_offloading_of_activations_and_weights(caplog: pytest.LogCaptureFixture) -> None:
    args = validated("--cpu-offloading --cpu-offloading-num-layers 2 --cpu-offloading-weights")
    assert core_transformer_config_from_args(args).cpu_offloading_weights
    with pytest.raises(ConfigurationError, match="weights does not work with --use-distributed-optimizer"):
        validated("--cpu-offloading --cpu-offloading-num-layers 2 --cpu-offloading-weights --use-distributed-optimizer")
    with pytest.raises(ConfigurationError, match="--cpu-offloading-num-layers of at least 1"):
        validated("--cpu-offloading")
    with pytest.raises(ValueError, match="--cpu-offloading does not work with --recompute-granularity"):
        validated("--cpu-offloading --cpu-offloading-num-layers 2 --recompute-activations")
    with caplog.at_level(logging.WARNING):
        validated("--cpu-offloading-num-layers 2")
    assert "--cpu-offloading-num-layers has no effect without --cpu-offloading" in caplog.text
