"""The library's configuration classes: their fields, what they derive and what they refuse."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.not_built import FIELDS_NOT_BUILT
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer import context_parallel_rules as cp_rules
from megatron.core.transformer import transformer_config_rules as rules
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        ModelParallelConfig,
        TransformerConfig,
        MLATransformerConfig,
        OptimizerConfig,
        DistributedDataParallelConfig,
    )
}
FACTS = list(
    csv.DictReader(
        Path(__file__).with_name("config_facts.tsv").open(encoding="utf-8"),
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    )
)
ADDED_FIELDS = {
    "muon_momentum",
    "muon_use_nesterov",
    "muon_num_ns_steps",
    "muon_scale_mode",
    "muon_extra_scale_factor",
    "pipeline_schedule",
    "moe_shared_expert_gate",
    "torch_compile",
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_mscale",
    "yarn_mscale_all_dim",
}


def config(**values: Any) -> TransformerConfig:
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    return TransformerConfig(**(sizes | values))


PIPELINE = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}


def unchecked(**values: Any) -> Any:
    """A configuration whose values are changed past its rules, for rules behind what is not built."""
    made = config()
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact['class']}.{fact['field']}")
def test_field_is_as_the_interface_says(fact: dict[str, str]) -> None:
    fields = {field.name: field for field in dataclasses.fields(CLASSES[fact["class"]])}
    default = fields[fact["field"]].default
    if fact["field"] == "activation_func":
        assert default is torch.nn.functional.gelu
    else:
        assert str(default) == fact["default"].strip("'")


def test_no_other_fields() -> None:
    for name, cls in CLASSES.items():
        public = {fact["field"] for fact in FACTS if fact["class"] == name}
        assert set(cls.__annotations__) - public <= ADDED_FIELDS


def test_derived_values() -> None:
    made = config()
    assert (made.ffn_hidden_size, made.kv_channels, made.num_query_groups) == (256, 16, 4)
    assert (made.recompute_modules, made.expert_tensor_parallel_size) == (["core_attn"], 1)
    assert (made.autocast_dtype, made.microbatch_group_size_per_vp_stage) == (torch.float32, 1)
    assert made.attention_backend is AttnBackend.auto


def test_given_values_stay() -> None:
    made = config(ffn_hidden_size=100, kv_channels=8, num_query_groups=2)
    assert (made.ffn_hidden_size, made.kv_channels, made.num_query_groups) == (100, 8, 2)


def test_initialisers() -> None:
    made = config(init_method_std=0.5)
    weight = torch.empty(200, 200)
    torch.manual_seed(0)
    made.init_method(weight)
    assert weight.std().item() == pytest.approx(0.5, rel=0.02)
    made.output_layer_init_method(weight)
    assert weight.std().item() == pytest.approx(0.5 / (2 * 4) ** 0.5, rel=0.02)


def test_replace_gives_a_checked_variant() -> None:
    made = dataclasses.replace(config(), num_layers=6)
    assert made.num_layers == 6
    with pytest.raises(ValueError, match="num_attention_heads"):
        dataclasses.replace(made, tensor_model_parallel_size=3)


def test_layer_scaling_forces_fp32_softmax() -> None:
    made = config(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=False)
    assert made.attention_softmax_in_fp32


@pytest.mark.parametrize(
    "freq, layers", [(2, [0, 1, 0, 1]), (4, [0, 0, 0, 1]), ([1, 0, 0, 1], [1, 0, 0, 1]), (None, None)]
)
def test_layers_without_rope(freq: Any, layers: Any) -> None:
    assert config(no_rope_freq=freq).no_rope_freq == layers


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True, "bf16": True}, "fp16 and bf16 exclude each other"),
    ({"tensor_model_parallel_size": 0}, r"tensor_model_parallel_size \(0\) must be at least 1"),
    ({"sequence_parallel": True}, r"sequence_parallel needs tensor_model_parallel_size \(1\)"),
    ({"pipeline_model_parallel_size": 2}, "needs pipeline_dtype"),
    ({"tensor_model_parallel_size": 3}, r"num_attention_heads \(4\) must be divisible by .* \(3\)"),
    ({"tensor_model_parallel_size": 4, "num_query_groups": 2}, r"num_query_groups \(2\) must be divisible"),
    ({"num_query_groups": 3}, r"num_attention_heads \(4\) must be divisible by num_query_groups \(3\)"),
    ({"hidden_size": 65}, r"hidden_size \(65\) must be divisible by num_attention_heads \(4\)"),
    ({"attention_dropout": 1.0}, r"attention_dropout \(1.0\) must be at least 0 and below 1"),
    ({"window_size": (-2, 0)}, "must be two distances"),
    ({"normalization": "BatchNorm"}, "it can be 'LayerNorm', 'RMSNorm'"),
    ({"recompute_granularity": "some"}, "it can be 'full', 'selective'"),
    ({"recompute_granularity": "full"}, "needs recompute_method 'block' or 'uniform', found None"),
    ({"recompute_granularity": "full", "recompute_method": "block"}, r"recompute_num_layers \(None\)"),
    ({"recompute_granularity": "selective", "recompute_num_layers": 1}, "has no meaning"),
    ({"recompute_granularity": "selective", "recompute_method": "block"}, "has no meaning"),
    ({"recompute_granularity": "selective", "recompute_modules": ["x"]}, r"\['x'\] are unknown; choose"),
    (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "distribute_saved_activations": True,
            "sequence_parallel": True,
            "tensor_model_parallel_size": 2,
        },
        "distribute_saved_activations splits what sequence_parallel has split",
    ),
    ({"bias_activation_fusion": True, "add_bias_linear": False}, "with gelu needs add_bias_linear"),
    ({"bias_activation_fusion": True, "activation_func": torch.relu}, "not with relu"),
    ({"activation_func_fp8_input_store": True}, "works only with gated silu"),
    ({"rotary_interleaved": True, "apply_rope_fusion": True}, "needs apply_rope_fusion to be off"),
    ({"no_rope_freq": 3}, r"num_layers \(4\) must be divisible by no_rope_freq \(3\)"),
    ({"no_rope_freq": [1]}, r"lists 1 layers, num_layers \(4\)"),
    ({"moe_ffn_hidden_size": 5}, "needs num_moe_experts"),
    ({"moe_shared_expert_intermediate_size": 0}, "must be positive"),
    ({"moe_pad_expert_input_to_capacity": True}, "needs moe_expert_capacity_factor"),
    ({"moe_router_group_topk": 2}, "needs moe_router_num_groups"),
    ({"moe_router_load_balancing_type": "even"}, "'even': it can be 'aux_loss', 'seq_aux_loss', 'global_aux_loss'"),
    ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "only aux_loss, .* can stand together"),
    ({"moe_router_load_balancing_type": ["aux_loss", "aux_loss"], "moe_aux_loss_coeff": [1, 2]}, "each loss once"),
    ({"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}, r"moe_aux_loss_coeff \(0\) must have one value"),
    ({"moe_aux_loss_coeff": [0.1, 0.1]}, "one value for each of the 1 of"),
    ({"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "sinkhorn"}, "does not work with"),
    ({"moe_router_group_topk": 3, "moe_router_num_groups": 2}, "must not exceed moe_router_num_groups"),
]


@pytest.mark.parametrize("values, message", REFUSED)
def test_refusal(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


STAGES = {"pipeline_model_parallel_size": 4, "pipeline_dtype": torch.float32}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_layers": 6}, r"num_layers \(6\) must be divisible by 4"),
        (
            {"num_layers_in_first_pipeline_stage": 1, "account_for_loss_in_pipeline_split": True},
            "exclude each other",
        ),
        ({"num_layers_in_first_pipeline_stage": 0}, "must be positive"),
        (
            {"num_layers_in_first_pipeline_stage": 2},
            "the 2 remaining layers must share equally among 3 stages",
        ),
        ({"num_layers_in_last_pipeline_stage": 5}, "do not fit each other"),
        ({"account_for_embedding_in_pipeline_split": True}, r"num_layers \(4\) plus 1 for account_for"),
    ],
)
def test_refused_stages(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**(STAGES | values))


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": 8},
        {"num_layers": 7, "num_layers_in_first_pipeline_stage": 1},
        {
            "num_layers": 8,
            "num_layers_in_first_pipeline_stage": 1,
            "num_layers_in_last_pipeline_stage": 3,
        },
        {"num_layers": 7, "account_for_loss_in_pipeline_split": True},
        {
            "num_layers": 6,
            "account_for_loss_in_pipeline_split": True,
            "account_for_embedding_in_pipeline_split": True,
        },
    ],
)
def test_accepted_stages(values: dict[str, Any]) -> None:
    config(**(STAGES | values))


BEHIND_UNBUILT: list[tuple[Any, dict[str, Any], str]] = [
    (rules.require_fp8_fits, {"fp8_param": True}, "fp8_param needs fp8"),
    (rules.require_fp8_fits, {"fp8": "e4m3", "fp8_param": True, "fp8_recipe": "mxfp8"}, "cut through blocks"),
    (rules.require_fp8_fits, {"fp8": "e4m3", "fp8_param": True}, "needs gradient_accumulation_fusion"),
    (rules.require_fp8_fits, {"fp8": "e4m3", "first_last_layers_bf16": True}, "'delayed'"),
    (rules.require_experts_for_expert_parallel, {"expert_model_parallel_size": 2}, "needs num_moe_experts"),
    (
        rules.require_dispatcher_fits,
        {"moe_enable_deepep": True},
        "needs moe_token_dispatcher_type 'flex', found 'allgather'",
    ),
    (
        rules.require_dispatcher_fits,
        {"moe_shared_expert_overlap": True},
        "needs moe_token_dispatcher_type 'alltoall'",
    ),
    (rules.require_fp8_for_router_padding, {"moe_router_padding_for_fp8": True}, "needs fp8"),
    (rules.require_router_fits, {"num_moe_experts": 2}, "needs add_bias_linear to be off"),
    (
        rules.require_router_fits,
        {"num_moe_experts": 2, "add_bias_linear": False, "moe_router_topk": 1},
        "needs moe_router_pre_softmax",
    ),
    (
        rules.require_router_fits,
        {"num_moe_experts": 2, "add_bias_linear": False, "moe_router_enable_expert_bias": True},
        "needs moe_router_score_function 'sigmoid'",
    ),
    (
        rules.require_router_fits,
        {"num_moe_experts": 2, "add_bias_linear": False, "moe_router_topk": 3},
        r"moe_router_topk \(3\) must be at least 1 and at most num_moe_experts \(2\)",
    ),
    (
        rules.derive_router_groups,
        {"moe_router_group_topk": 1, "moe_router_num_groups": 2, "num_moe_experts": 4, "moe_router_topk": 3},
        "at most 2, the experts of so many groups",
    ),
    (
        rules.derive_router_groups,
        {"moe_router_topk_limited_devices": 1, "moe_router_group_topk": 1},
        "say the same",
    ),
    (
        rules.derive_router_groups,
        {"moe_router_group_topk": 1, "moe_router_num_groups": 2, "num_moe_experts": 3},
        r"num_moe_experts \(3\) must be divisible",
    ),
    (
        rules.require_offloading_fits,
        {"cpu_offloading": True, "cpu_offloading_num_layers": 4},
        "below num_layers",
    ),
    (
        rules.require_capturable_layers,
        {"enable_cuda_graph": True, "pipeline_schedule": "zb-h1", "hidden_dropout": 0.0, "attention_dropout": 0.0},
        r"enable_cuda_graph does not work with pipeline_schedule \(zb-h1\): a captured backward is whole",
    ),
    (rules.require_capturable_layers, {"enable_cuda_graph": True}, r"hidden_dropout \(0.1\): random states"),
    (
        rules.require_capturable_layers,
        {"enable_cuda_graph": True, "num_moe_experts": 2},
        r"num_moe_experts \(2\): how many tokens",
    ),
    (
        rules.require_capturable_layers,
        {"enable_cuda_graph": True, "recompute_granularity": "full"},
        "does not work with recompute_granularity",
    ),
    (
        cp_rules.require_valid_cp_comm_type,
        {"context_parallel_size": 2, "cp_comm_type": ["p2p"]},
        r"lists 1 layers, num_layers \(4\)",
    ),
    (
        rules.require_yarn_for_fused_rope,
        {"apply_rope_fusion": True, "rope_type": "rope"},
        "needs rope_type 'yarn', found 'rope'",
    ),
]


@pytest.mark.parametrize("rule, values, message", BEHIND_UNBUILT)
def test_refusal_behind_what_is_not_built(rule: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(unchecked(**values))


def test_experts_are_as_wide_as_the_dense_block() -> None:
    made = unchecked(num_moe_experts=2)
    with pytest.warns(UserWarning, match=r"experts get ffn_hidden_size \(256\)"):
        rules.derive_moe_ffn_hidden_size(made)
    assert made.moe_ffn_hidden_size == 256


def test_negative_capacity_is_none() -> None:
    assert config(moe_expert_capacity_factor=-1.0).moe_expert_capacity_factor is None


OFF_BY_DEFAULT = {
    cls: [field for field in dataclasses.fields(cls) if field.name in FIELDS_NOT_BUILT]
    for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
}


@pytest.mark.parametrize(
    "cls, field",
    [(cls, field) for cls, fields in OFF_BY_DEFAULT.items() for field in fields],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", None),
)
def test_field_of_unbuilt_capability_is_refused(cls: Any, field: Any) -> None:
    value = True if isinstance(field.default, bool) else 2 if isinstance(field.default, int) else "used"
    with pytest.raises(NotImplementedError, match=rf"{field.name} \({value}\): .* is not built yet"):
        cls(**{field.name: value})


def test_every_unbuilt_row_is_a_field() -> None:
    names = {field.name for cls in OFF_BY_DEFAULT for field in dataclasses.fields(cls)}
    assert set(FIELDS_NOT_BUILT) <= names


def test_unbuilt_dispatcher_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"moe_token_dispatcher_type \(flex\) is not built yet"):
        config(num_moe_experts=2, moe_token_dispatcher_type="flex", add_bias_linear=False)


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (OptimizerConfig, {"optimizer": "lion"}, "it can be 'adam', 'sgd'"),
        (OptimizerConfig, {"fp16": True, "bf16": True}, "exclude each other"),
        (OptimizerConfig, {"lr": 1.0, "min_lr": 2.0}, r"min_lr \(2.0\) must not exceed lr \(1.0\)"),
        (OptimizerConfig, {"exp_avg_dtype": torch.bfloat16}, "needs use_precision_aware_optimizer"),
        (OptimizerConfig, {"loss_scale": 0.0}, "must be positive"),
        (DistributedDataParallelConfig, {"bucket_size": 0}, "must be positive, or None for one bucket"),
    ],
)
def test_refusal_of_other_classes(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_a_layout_is_parsed_checked_and_gives_the_number_of_chunks() -> None:
    made = config(num_layers=8, pipeline_model_parallel_layout="Ett|(tt|)*2,ttL", **PIPELINE)
    assert isinstance(made.pipeline_model_parallel_layout, PipelineParallelLayerLayout)
    assert made.virtual_pipeline_model_parallel_size == 2
    assert (
        dataclasses.replace(made, hidden_dropout=0.5).pipeline_model_parallel_layout
        == made.pipeline_model_parallel_layout
    )
    one = config(
        num_layers=2, pipeline_model_parallel_layout=[["embedding", "decoder"], ["decoder", "loss"]], **PIPELINE
    )
    assert one.virtual_pipeline_model_parallel_size is None
    with pytest.raises(ValueError, match="has 8 transformer layers .t., num_layers is 9"):
        dataclasses.replace(made, num_layers=9)
    with pytest.raises(ValueError, match=r"has 2 stages for each of the .* \(2\) ranks, found .* \(4\)"):
        dataclasses.replace(made, virtual_pipeline_model_parallel_size=4)


@pytest.mark.parametrize(
    ("schedule", "chunks", "message"),
    [
        ("zb-h1", 2, "needs virtual_pipeline_model_parallel_size to be unset"),
        ("interleaved", None, "to be at least 2"),
        ("zb-v", 4, "to be 2"),
    ],
)
def test_a_schedule_is_made_for_a_number_of_chunks(schedule: str, chunks: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(num_layers=8, pipeline_schedule=schedule, virtual_pipeline_model_parallel_size=chunks, **PIPELINE)
    with pytest.raises(ValueError, match="needs pipeline_model_parallel_size of at least 2"):
        config(num_layers=8, pipeline_schedule=schedule)
    assert config(num_layers=8, pipeline_schedule="zb-v", **PIPELINE).virtual_pipeline_model_parallel_size == 2
