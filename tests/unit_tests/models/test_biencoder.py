"""Two encoders over several data parallel ranks learn what one process learns from the joint batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.biencoder import BiEncoderModel
from megatron.core.models.biencoder.in_batch_loss import hits_among_top, in_batch_loss, in_batch_scores
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

LENGTH, BATCH, VOCAB = 12, 8, 90


def build(tp: int, sp: bool, shared: bool = False, pp: int = 1) -> BiEncoderModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        sequence_parallel=sp,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return BiEncoderModel(config, 2, bert_layer_local_spec, VOCAB, LENGTH, 8, shared=shared)


def joint_batch() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    parts = []
    for _ in range(2):
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
        parts += [torch.randint(5, VOCAB, (BATCH, LENGTH), generator=generator)]
        parts += [(torch.arange(LENGTH)[None] < lengths).long()]
    return parts


def gradients(tp: int, sp: bool, shared: bool) -> tuple[float, dict[int, int], dict[str, Tensor]]:
    """(loss, hits, gradients) of the joint batch, of which each data parallel rank has a part."""
    parallel_state.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(7)
    model = build(tp, sp, shared)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    group = parallel_state.get_data_parallel_group()
    own = [part.chunk(group.size())[group.rank()] for part in joint_batch()]
    scores = in_batch_scores(*ddp(*own), group, scaled=True)
    loss, columns = in_batch_loss(scores, group)
    (loss / len(scores)).backward()
    finalize_model_grads([ddp])
    hits = torch.stack(list(hits_among_top(scores, columns, (1, 3)).values()))
    sums = torch.cat([loss.detach()[None], hits.float()])
    torch.distributed.all_reduce(sums, group=group)
    found = {name: param.main_grad.clone() for name, param in model.named_parameters()}
    parallel_state.destroy_model_parallel()
    return float(sums[0]), {k: int(n) for k, n in zip((1, 3), sums[1:])}, found


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_data_parallel_ranks_equal_the_joint_batch(shared: bool) -> None:
    one_loss, one_hits, one = run_ranks(1, gradients, 1, False, shared)[0]
    assert ("query_model.projection_enc.weight" in one) != shared
    for loss, hits, found in run_ranks(2, gradients, 1, False, shared):
        assert loss == pytest.approx(one_loss, rel=1e-6)
        assert hits == one_hits
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, one[name], rtol=1e-4, atol=1e-7, msg=name)


def test_tensor_and_sequence_parallel_with_data_parallel() -> None:
    one_loss, one_hits, one = run_ranks(1, gradients, 1, False, False)[0]
    for loss, hits, found in run_ranks(4, gradients, 2, True, False):
        assert loss == pytest.approx(one_loss, rel=1e-6) and hits == one_hits
        for name, gradient in found.items():
            if gradient.shape == one[name].shape:  # not cut
                torch.testing.assert_close(gradient, one[name], rtol=1e-4, atol=1e-7, msg=name)


def initial_weights() -> tuple[dict[str, Tensor], str]:
    parallel_state.initialize_model_parallel(1)
    model_parallel_cuda_manual_seed(7)
    model = build(1, False)
    try:
        build(1, False, pp=2)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    parallel_state.destroy_model_parallel()
    return {name: param.detach().clone() for name, param in model.named_parameters()}, refusal


def test_the_two_encoders_start_apart_and_have_one_stage() -> None:
    weights, refusal = run_ranks(1, initial_weights)[0]
    name = "encoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(weights[f"query_model.{name}"], weights[f"context_model.{name}"])
    assert "use tensor_model_parallel_size" in refusal


def test_hits_count_what_scores_higher() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    hits = hits_among_top(scores, torch.tensor([0, 1, 2]), (1, 2, 3, 10))
    assert {k: int(n) for k, n in hits.items()} == {1: 1, 2: 2, 3: 3, 10: 3}
