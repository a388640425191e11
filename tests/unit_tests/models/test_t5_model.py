"""T5 in every layout learns the same from the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import (
    decoder_model_with_local_spec,
    encoder_model_with_local_spec,
    get_t5_decoder_with_transformer_engine_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

ENCODER_LENGTH, DECODER_LENGTH, BATCH, MICROBATCHES, STEPS = 16, 12, 2, 4, 4
VOCAB, PADDED_VOCAB = 90, 96


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    encoder_pp: int = 0
    pp: int = 1
    sp: bool = False
    dist_opt: bool = False
    schedule: str = "auto"
    recompute: bool = False
    positions: str = "relative"
    tied: bool = True
    fused_loss: bool = False

    @property
    def model_ranks(self) -> int:
        return self.tp * (self.encoder_pp + self.pp)


def microbatch(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    encoder = torch.randint(0, VOCAB, (BATCH, ENCODER_LENGTH), generator=generator)
    decoder = torch.randint(0, VOCAB, (BATCH, DECODER_LENGTH), generator=generator)
    lengths = torch.randint(ENCODER_LENGTH // 2, ENCODER_LENGTH + 1, (BATCH, 1), generator=generator)
    padding = torch.arange(ENCODER_LENGTH)[None] >= lengths
    weights = (torch.rand(decoder.shape, generator=generator) < 0.8).float()
    return {"encoder": encoder, "decoder": decoder, "padding": padding, "labels": encoder[:, :12], "weights": weights}


def loss_func(batch: dict[str, Tensor], losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (losses * batch["weights"]).sum() / batch["weights"].sum()
    return loss, {"loss": loss.detach()}


def forward_step(data: Any, model: Any) -> tuple[Any, Any]:
    batch = next(data)
    padding = batch["padding"][:, None, None, :]
    return model(batch["encoder"], batch["decoder"], padding, None, padding, batch["labels"]), partial(loss_func, batch)


def build(layout: Layout) -> T5Model:
    stage = parallel_state.get_pipeline_model_parallel_rank()

    def config(num_layers: int, stages: int, before: int) -> TransformerConfig:
        return TransformerConfig(
            num_layers=num_layers,
            hidden_size=32,
            num_attention_heads=4,
            kv_channels=12,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=stages,
            pipeline_model_parallel_split_rank=before or None,
            sequence_parallel=layout.sp,
            pipeline_dtype=torch.float32,
            pipeline_schedule=layout.schedule if stages > 1 or before else "auto",
            deallocate_pipeline_outputs=True,
            cross_entropy_loss_fusion=layout.fused_loss,
            recompute_granularity="full" if layout.recompute else None,
            recompute_method="uniform" if layout.recompute else None,
            recompute_num_layers=1 if layout.recompute else None,
        )

    before = layout.encoder_pp
    return T5Model(
        config(2, layout.pp, before),
        config(4, before or 1, 0),
        encoder_model_with_local_spec(),
        decoder_model_with_local_spec(),
        PADDED_VOCAB,
        ENCODER_LENGTH,
        pre_process=stage in (0, before),
        post_process=stage in (before - 1, before + layout.pp - 1),
        share_embeddings_and_output_weights=layout.tied,
        position_embedding_type=layout.positions,
        add_encoder=not before or stage < before,
        add_decoder=stage >= before,
        true_vocab_size=VOCAB,
    )


def train(layout: Layout) -> list[float]:
    """The losses of a few steps, on the last stage; the weights learn from all samples whatever the layout."""
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, encoder_pipeline_model_parallel_size=layout.encoder_pp
    )
    model_parallel_cuda_manual_seed(7)
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    model = build(layout)
    config = model.config
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=layout.dist_opt)
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, adam_eps=1e-4, clip_grad=1.0, use_distributed_optimizer=layout.dist_opt), [wrapped]
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
            seq_length=ENCODER_LENGTH,
            decoder_seq_length=DECODER_LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        if parallel_state.is_pipeline_last_stage():
            total = torch.tensor([float(sum(r["loss"] for r in reports))])
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
            losses += [float(total) / MICROBATCHES, float(grad_norm)]
    return losses


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, bool], list[float]]:
    """Losses and norms of gradients in turn, of one process, by (positions, tied)."""
    found = {}
    for kind in (("relative", True), ("learned_absolute", False), ("rope", True)):
        found[kind] = run_ranks(1, train, Layout(positions=kind[0], tied=kind[1]))[0]
        assert found[kind][-2] < found[kind][0]
    return found


LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "tp2-sp-recompute": (2, Layout(tp=2, sp=True, recompute=True, fused_loss=True)),
    "dp2-distopt": (2, Layout(dist_opt=True, positions="learned_absolute", tied=False)),
    "pp1+1-recompute": (2, Layout(encoder_pp=1, recompute=True)),
    "learned-untied-pp2+2": (4, Layout(encoder_pp=2, pp=2, positions="learned_absolute", tied=False)),
    "pp2+2-zb-h1": (4, Layout(encoder_pp=2, pp=2, schedule="zb-h1")),
    "tp2-sp-pp1+1-dp2-distopt": (8, Layout(2, 1, sp=True, dist_opt=True)),
}
MORE_LAYOUTS = {
    "rope-tp2-sp": (2, Layout(tp=2, sp=True, positions="rope")),
    "rope-pp1+2": (3, Layout(encoder_pp=1, pp=2, positions="rope")),
    "pp1+1": (2, Layout(encoder_pp=1)),
    "learned-untied-pp1+1-dp2-distopt": (
        4,
        Layout(encoder_pp=1, dist_opt=True, positions="learned_absolute", tied=False),
    ),
    "pp2+2": (4, Layout(encoder_pp=2, pp=2)),
    "pp2+1-gpipe": (3, Layout(encoder_pp=2, pp=1, schedule="gpipe")),
    "pp2+2-gpipe": (4, Layout(encoder_pp=2, pp=2, schedule="gpipe")),
}


def numbers_equal_one_process(expected: dict[tuple[str, bool], list[float]], world: int, layout: Layout) -> None:
    ranks = [losses for losses in run_ranks(world, train, layout) if losses]
    assert len(ranks) == world // (layout.encoder_pp + layout.pp)
    for losses in ranks:
        assert losses == pytest.approx(expected[layout.positions, layout.tied], rel=1e-5)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_numbers_equal_one_process(expected: dict[tuple[str, bool], list[float]], name: str) -> None:
    numbers_equal_one_process(expected, *LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MORE_LAYOUTS))
def test_numbers_equal_one_process_in_more_layouts(expected: dict[tuple[str, bool], list[float]], name: str) -> None:
    numbers_equal_one_process(expected, *MORE_LAYOUTS[name])


def test_transformer_engine_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="get_t5_decoder_with_local_block_spec"):
        get_t5_decoder_with_transformer_engine_block_spec(2)
