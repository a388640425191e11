"""BERT in every layout learns the same from the same samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.bert import BertModel
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

LENGTH, BATCH, MICROBATCHES, STEPS = 16, 2, 4, 4
VOCAB, PADDED_VOCAB = 90, 96


def microbatch(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    real = (torch.arange(LENGTH)[None] < lengths).long()
    hidden = (torch.rand(ids.shape, generator=generator) < 0.3) & (real == 1)
    return {
        "text": torch.where(hidden, 4, ids),
        "labels": torch.where(hidden, ids, -1),
        "loss_mask": hidden.long(),
        "padding_mask": real,
        "types": (torch.arange(LENGTH)[None] >= LENGTH // 3).long().expand_as(ids),
        "is_random": torch.randint(0, 2, (BATCH,), generator=generator),
    }


def loss_func(batch: dict[str, Tensor], output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    token_losses, order = output
    weights = batch["loss_mask"].float()
    loss = (token_losses * weights).sum() / weights.sum().clamp(min=1)
    loss = loss + cross_entropy(order.float(), batch["is_random"])
    return loss, {"loss": loss.detach()}


def forward_step(data: Any, model: Any) -> tuple[Any, Any]:
    batch = next(data)
    output = model(batch["text"], batch["padding_mask"], batch["types"], batch["labels"])
    return output, partial(loss_func, batch)


def train(tp: int, pp: int, sp: bool, dist_opt: bool) -> list[float]:
    """The losses of a few steps, the same on every rank; the weights learn from all samples whatever the layout."""
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(7)
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        pipeline_dtype=torch.float32,
    )
    model = BertModel(
        config,
        2,
        bert_layer_local_spec,
        PADDED_VOCAB,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        true_vocab_size=VOCAB,
    )
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=dist_opt)
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, adam_eps=1e-4, clip_grad=1.0, use_distributed_optimizer=dist_opt), [wrapped]
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    losses = []
    for _ in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        mine = [microbatch(i) for i in range(dp_rank, MICROBATCHES, dp)]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine),
            model=[wrapped],
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
        total = torch.tensor([float(sum(r["loss"] for r in reports))])
        if parallel_state.is_pipeline_last_stage():
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        losses.append(float(total) / MICROBATCHES)
    return losses if parallel_state.is_pipeline_last_stage() else []


@pytest.fixture(scope="module")
def expected() -> list[float]:
    losses = run_ranks(1, train, 1, 1, False, False)[0]
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize(
    ("world", "tp", "pp", "sp", "dist_opt"),
    [
        (2, 2, 1, False, False),
        (2, 2, 1, True, False),
        (2, 1, 2, False, False),
        (2, 1, 1, False, True),
        (8, 2, 2, True, True),
    ],
    ids=["tp2", "tp2-sp", "pp2", "dp2-distopt", "tp2-sp-pp2-dp2-distopt"],
)
def test_losses_equal_one_process(
    expected: list[float], world: int, tp: int, pp: int, sp: bool, dist_opt: bool
) -> None:
    for losses in run_ranks(world, train, tp, pp, sp, dist_opt):
        assert not losses or losses == pytest.approx(expected, rel=1e-5)


def embeddings_and_means() -> tuple[Tensor, Tensor]:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, hidden_dropout=0.0)
    model = BertModel(config, 2, bert_layer_local_spec, 96, LENGTH, return_embeddings=True).eval()
    batch = microbatch(0)
    with torch.no_grad():
        vectors = model(batch["text"], batch["padding_mask"], batch["types"])
        states = model.encoder(
            model.embedding(batch["text"], model.bert_position_ids(batch["text"]), batch["types"]),
            model.bert_extended_attention_mask(batch["padding_mask"]),
        )
    lengths = batch["padding_mask"].sum(1).tolist()
    return vectors, torch.stack([states[1 : n - 1, row].mean(0) for row, n in enumerate(lengths)])


def test_embeddings_are_means_of_the_inner_tokens() -> None:
    vectors, expected = run_ranks(1, embeddings_and_means)[0]
    torch.testing.assert_close(vectors, expected)
