"""GPTModel: one process against tensor and pipeline layouts, recompute, documents, checkpoint keys,
refusals."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, set_initialization_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH, BATCH = 4, 32, 4, 64, 16, 2

LLAMA_LIKE = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "bias_activation_fusion": True,
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (TransformerConfig, GPTModel, layer spec)
    "gpt2": ({"bias_activation_fusion": True}, {"share_embeddings_and_output_weights": True}, {}),
    "llama": (LLAMA_LIKE, {"position_embedding_type": "rope"}, {}),
    "norms": (
        {"qk_layernorm": True, "layernorm_zero_centered_gamma": True, "window_size": (5, 0)},
        {"position_embedding_type": "rope", "rotary_percent": 0.5},
        {"qk_layernorm": True},
    ),
    "residual": (
        {"apply_residual_connection_post_layernorm": True, "no_rope_freq": 2, "rotary_interleaved": True},
        {"position_embedding_type": "rope", "seq_len_interpolation_factor": 2.0},
        {"qk_l2_norm": True},
    ),
    "relu2": (
        {
            "activation_func": lambda x: torch.relu(x).square(),
            "attention_backend": AttnBackend.unfused,
            "apply_query_key_layer_scaling": True,
        },
        {"position_embedding_type": "none"},
        {},
    ),
    "geglu": (
        {"gated_linear_unit": True, "add_qkv_bias": True, "add_bias_linear": False},
        {"position_embedding_type": "learned_absolute"},
        {},
    ),
}


def build(
    variant: str, tp: int = 1, pp: int = 1, sequence_parallel: bool = False, chunk: Any = None, **extra: Any
) -> GPTModel:
    config_settings, model_settings, spec_settings = VARIANTS[variant]
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        **{**dropout, **config_settings, **extra},
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(**spec_settings),
        VOCAB,
        LENGTH,
        **{**model_settings, **(chunk or {})},
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.arange(LENGTH).expand(BATCH, -1)


def whole_gradients(model: GPTModel) -> dict[str, Tensor]:
    """This rank's gradients by global name, and what dimension they are sharded along."""
    found = {}
    for name, param in model.named_parameters():
        grad = param.grad
        if getattr(param, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
            torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        found[model.global_parameter_name(name)] = (grad, getattr(param, "partition_dim", -1), _stride(param))
    return found


def _stride(param: Tensor) -> int:
    return getattr(param, "partition_stride", 1)


def run_layout(variant: str, tp: int, sequence_parallel: bool) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1234)
    model = build(variant, tp=tp, sequence_parallel=sequence_parallel)
    weights = {
        name: (param.detach().clone(), getattr(param, "partition_dim", -1), _stride(param))
        for name, param in model.named_parameters()
    }
    ids, labels, positions = batch()
    loss = model(ids, positions, None, labels=labels)
    loss.mean().backward()
    return loss.detach(), weights, whole_gradients(model)


def joined(parts: list[dict[str, Any]], name: str) -> Tensor:
    """The whole tensor of its shards on all ranks."""
    _, dim, stride = parts[0][name]
    shards = [part[name][0] for part in parts]
    if dim < 0:
        for shard in shards[1:]:
            torch.testing.assert_close(shard, shards[0])
        return shards[0]
    pieces = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)


@functools.cache
def one_process(variant: str) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    [result] = run_ranks(1, run_layout, variant, 1, False)
    return result


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_tensor_ranks_equal_one(variant: str, sequence_parallel: bool) -> None:
    expected_loss, expected_weights, expected_grads = one_process(variant)
    results = run_ranks(2, run_layout, variant, 2, sequence_parallel)
    for loss, weights, _ in results:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
        assert set(weights) == set(expected_weights)
    for name, (weight, _, _) in expected_weights.items():
        assert torch.equal(joined([weights for _, weights, _ in results], name), weight), name
    for name, (grad, _, _) in expected_grads.items():
        torch.testing.assert_close(joined([grads for _, _, grads in results], name), grad, rtol=1e-4, atol=1e-6)


# --- pipeline stages ------------------------------------------------------------------------------------


def run_stages(variant: str, pp: int, uneven: dict[str, Any]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Forward and backward through `pp` stages, one microbatch, activations sent by hand."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(1234)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    first, last = rank == 0, rank == pp - 1
    model = build(variant, pp=pp, chunk={"pre_process": first, "post_process": last}, **uneven)
    ids, labels, positions = batch()
    if not first:
        received = torch.empty(LENGTH, BATCH, HIDDEN)
        torch.distributed.recv(received, rank - 1)
        model.set_input_tensor(received.requires_grad_())
    output = model(ids, positions, None, labels=labels if last else None)
    if last:
        output.mean().backward()
    else:
        torch.distributed.send(output.detach(), rank + 1)
        gradient = torch.empty_like(output)
        torch.distributed.recv(gradient, rank + 1)
        output.backward(gradient)
    if not first:
        torch.distributed.send(received.grad, rank - 1)
    grads = {name: param.grad for name, param in model.named_parameters()}
    weights = {name: param.detach() for name, param in model.named_parameters()}
    named = {model.global_parameter_name(name): (weights[name], grads[name]) for name in grads}
    return output.detach() if last else None, named


@pytest.mark.parametrize(
    ("pp", "uneven"),
    [
        (2, {}),
        (4, {}),
        (2, {"num_layers_in_first_pipeline_stage": 1}),
        (3, {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
    ],
)
@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_stages_equal_one_process(variant: str, pp: int, uneven: dict[str, Any]) -> None:
    expected_loss, weights, grads = one_process(variant)
    results = run_ranks(pp, run_stages, variant, pp, uneven)
    torch.testing.assert_close(results[-1][0], expected_loss, rtol=1e-5, atol=1e-5)
    summed: dict[str, Tensor] = {}
    for _, parameters in results:
        for name, (weight, grad) in parameters.items():
            assert torch.equal(weight, weights[name][0]), name
            summed[name] = summed.get(name, 0) + grad  # a tied pair's gradients are parts of a sum
    assert set(summed) == set(weights)
    for name, grad in summed.items():
        torch.testing.assert_close(grad, grads[name][0], rtol=1e-4, atol=1e-6)


# --- recompute ------------------------------------------------------------------------------------------

RECOMPUTE = {
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "norms and mlp": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
    "norms": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
}


def run_recomputed(tp: int, sequence_parallel: bool, settings: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1234)
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    model = build("gpt2", tp=tp, sequence_parallel=sequence_parallel, **dropout, **settings)
    ids, labels, positions = batch()
    losses = []
    for _ in range(2):  # the second one starts from where the generators were left
        loss = model(ids, positions, None, labels=labels)
        loss.mean().backward()
        losses.append(loss.detach())
    return torch.stack(losses), [param.grad for param in model.parameters()]


@functools.cache
def stored_activations(tp: int, sequence_parallel: bool) -> list[tuple[Tensor, list[Tensor]]]:
    return run_ranks(tp, run_recomputed, tp, sequence_parallel, {})


CASES = [(how, *layout) for how in RECOMPUTE for layout in ((1, False), (2, False), (2, True))]


@pytest.mark.parametrize(("how", "tp", "sequence_parallel"), [*CASES, ("distributed", 2, False)])
def test_recomputed_equals_stored_bitwise_with_dropout(how: str, tp: int, sequence_parallel: bool) -> None:
    settings = RECOMPUTE.get(how) or {**RECOMPUTE["uniform"], "distribute_saved_activations": True}
    stored = stored_activations(tp, sequence_parallel)
    recomputed = run_ranks(tp, run_recomputed, tp, sequence_parallel, settings)
    for (loss, grads), (expected_loss, expected_grads) in zip(recomputed, stored):
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(grad, expected) for grad, expected in zip(grads, expected_grads))
    assert not torch.equal(stored[0][0][0], stored[0][0][1])  # dropout differs from one step to the next


# --- documents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "llama", "relu2"])
def test_a_document_sees_nothing_of_the_others(variant: str) -> None:
    set_initialization_seed(5)
    model = build(variant)
    ids, _, _ = batch()
    lengths = [6, 10, 3, 13]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths]).view(BATCH, LENGTH)
    packed = model(ids, positions, None, packed_seq_params=PackedSeqParams("thd", starts, starts))
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).view(BATCH, LENGTH)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    mask = (owner[:, :, None] != owner[:, None, :])[:, None] | causal
    torch.testing.assert_close(packed, model(ids, positions, mask), rtol=1e-4, atol=1e-5)
    alone = model(ids[:1, 6:], positions[:1, 6:], None)
    torch.testing.assert_close(packed[:1, 6:], alone, rtol=1e-4, atol=1e-5)


# --- precision ------------------------------------------------------------------------------------------


def test_fp32_residual_stream_in_bf16() -> None:
    set_initialization_seed(5)
    model = build("llama", bf16=True, params_dtype=torch.bfloat16, fp32_residual_connection=True)
    types = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, __, output: types.append(output[0].dtype))
    ids, labels, positions = batch()
    logits = model(ids, positions, None)
    assert types == [torch.float32] * LAYERS and logits.dtype == torch.bfloat16
    set_initialization_seed(5)
    exact = build("llama")(ids, positions, None)
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.02)  # bf16 has 8 bits
    model(ids, positions, None, labels=labels).mean().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


def test_padded_vocabulary_changes_nothing() -> None:
    set_initialization_seed(5)
    ids, labels, positions = batch()
    config = build("gpt2").config
    losses = []
    for padded in (VOCAB, VOCAB + 24):
        model = GPTModel(config, get_gpt_layer_local_spec(), padded, LENGTH, true_vocab_size=VOCAB)
        loss = model(ids, positions, None, labels=labels)
        loss.mean().backward()
        losses.append((loss, model.decoder.layers[0].mlp.linear_fc1.weight.grad))
        assert not model.output_layer.weight.grad[VOCAB:].any()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["native", "linear"])
def test_fused_cross_entropy_gives_the_same(impl: str) -> None:
    ids, labels, positions = batch()
    results = []
    for fused in (False, True):
        set_initialization_seed(5)
        model = build("gpt2", cross_entropy_loss_fusion=fused, cross_entropy_fusion_impl=impl)
        loss = model(ids, positions, None, labels=labels)
        loss.mean().backward()
        results.append((loss, *(param.grad for param in model.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# --- checkpoint keys ------------------------------------------------------------------------------------


def run_sharded_keys(tp: int, pp: int, metadata: Any) -> dict[str, Any]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    stage = {"pre_process": rank == 0, "post_process": rank == pp - 1}
    variant = "gpt2" if metadata is None else "llama"
    sharded = build(variant, tp=tp, pp=pp, chunk=stage).sharded_state_dict(metadata=metadata)
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    apply_factories(sharded)
    return [
        (t.key, t.global_shape, t.global_offset, t.replica_id, t.allow_shape_mismatch) for t in nested_values(sharded)
    ]


def test_checkpoint_keys_of_a_tied_pipeline() -> None:
    results = run_ranks(4, run_sharded_keys, 2, 2, None)  # ranks: (tp, pp) = (0,0) (1,0) (0,1) (1,1)
    shapes = {key: shape for rank in results for key, shape, *_ in rank}
    h, f = HIDDEN, 4 * HIDDEN
    per_layer = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.layer_norm_bias": (h,),
        "self_attention.linear_qkv.weight": (3 * h, h),
        "self_attention.linear_qkv.bias": (3 * h,),
        "self_attention.linear_proj.weight": (h, h),
        "self_attention.linear_proj.bias": (h,),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.layer_norm_bias": (h,),
        "mlp.linear_fc1.weight": (f, h),
        "mlp.linear_fc1.bias": (f,),
        "mlp.linear_fc2.weight": (h, f),
        "mlp.linear_fc2.bias": (h,),
    }
    expected = {f"decoder.layers.{name}": (LAYERS, *shape) for name, shape in per_layer.items()}
    expected["embedding.word_embeddings.weight"] = (VOCAB, h)
    expected["embedding.position_embeddings.weight"] = (LENGTH, h)
    expected["decoder.final_layernorm.weight"] = expected["decoder.final_layernorm.bias"] = (h,)
    assert shapes == expected
    last = {key: rest for key, *rest in results[3]}
    assert last["embedding.word_embeddings.weight"] == [(VOCAB, h), (VOCAB // 2, 0), (1, 0, 0), True]
    offsets = {offset for key, _, offset, *_ in results[3] if key == "decoder.layers.mlp.linear_fc1.weight"}
    assert offsets == {(2, f // 2, 0), (3, f // 2, 0)}
    replicated = [r for key, *_, r, _ in results[1] if key == "decoder.layers.mlp.linear_fc2.bias"]
    assert replicated == [(0, 1, 0)] * 2


def test_checkpoint_keys_of_unstacked_gated_layers() -> None:
    results = run_ranks(2, run_sharded_keys, 2, 1, {"non_homogeneous_layers": True})
    h, f = HIDDEN, 4 * HIDDEN
    boxes = [
        (shape, offset) for key, shape, offset, *_ in results[1] if key == "decoder.layers.3.mlp.linear_fc1.weight"
    ]
    # [gate ; up], of which rank 1 has the second half of each
    assert sorted(boxes) == [((2 * f, h), (f // 2, 0)), ((2 * f, h), (f + f // 2, 0))]
    keys = {key for key, *_ in results[0]}
    assert "output_layer.weight" in keys and "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in keys


def test_flattened_range_of_a_gated_shard() -> None:
    """The distributed optimizer's part of [gate ; up] may begin in one and end in the other."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    local = torch.arange(24.0).view(6, 4)  # gate: rows 0-2, up: rows 3-5; rank 1 of 2
    whole = ShardedTensor.from_rank_offsets("w", local, (1, 1, 2), (0, 2, 5), prepend_axis_num=1)
    factory = apply_swiglu_sharded_factory(whole, ((0, 2, 5),))
    parts = factory.build_fn("w", local.flatten()[5:17], 0, slice(5, 17))
    assert [part.flattened_range for part in parts] == [slice(5, 12), slice(0, 5)]
    assert [part.global_offset for part in parts] == [(2, 3, 0), (2, 9, 0)]
    assert all(part.global_shape == (5, 12, 4) and part.local_shape == (3, 4) for part in parts)
    assert torch.equal(factory.merge_fn([part.data for part in parts]), local.flatten()[5:17])
    assert [part.flattened_range for part in factory.build_fn("w", local.flatten()[13:], 0, slice(13, 24))] == [
        slice(1, 12)
    ]


# --- the rest -------------------------------------------------------------------------------------------


def test_logits_and_hidden_shapes() -> None:
    model = build("llama").eval()
    ids, labels, positions = batch()
    assert model(ids, positions, None).shape == (BATCH, LENGTH, VOCAB)
    assert model(ids, positions, None, labels=labels).shape == (BATCH, LENGTH)
    hidden = build("llama", chunk={"post_process": False})(ids, positions, None)
    assert hidden.shape == (LENGTH, BATCH, HIDDEN)


def test_block_spec_gives_the_same_model() -> None:
    ids, _, positions = batch()
    set_initialization_seed(5)
    model = build("llama")
    set_initialization_seed(5)
    spec = get_gpt_decoder_block_spec(model.config, use_transformer_engine=False)
    other = GPTModel(model.config, spec, VOCAB, LENGTH, position_embedding_type="rope")
    assert torch.equal(model(ids, positions, None), other(ids, positions, None))


def test_refusals() -> None:
    with pytest.raises(NotImplementedError, match="transformer-impl local"):
        get_gpt_layer_with_transformer_engine_spec()
    with pytest.raises(NotImplementedError, match="use_kitchen=True"):
        get_gpt_layer_local_spec(use_kitchen=True)
    with pytest.raises(ValueError, match="'relative': a GPT has"):
        build("gpt2", chunk={"position_embedding_type": "relative"})
    with pytest.raises(ValueError, match="yarn needs a factor"):
        build("gpt2", chunk={"position_embedding_type": "yarn"})
    with pytest.raises(ValueError, match="longer than the 16 learned positions"):
        build("gpt2")(torch.zeros(1, 17, dtype=torch.int64), torch.arange(17)[None], None)
    with pytest.raises(NotImplementedError, match="without a mask"):
        ids, _, positions = batch()
        build("gpt2")(ids, positions, torch.zeros(1, 1, 1, 1).bool(), inference_context=StaticInferenceContext(2, 16))
