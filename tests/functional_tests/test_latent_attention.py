"""Latent attention and further tokens through the program: layouts go on from each other's checkpoints, and write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows

MODEL = """--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4
    --v-head-dim 6 --qk-layernorm --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu
    --mtp-num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-aux-loss-coeff 0.05
    --moe-router-load-balancing-type aux_loss --hidden-dropout 0 --attention-dropout 0 --train-iters 4 --seed 3
    --use-distributed-optimizer"""
SAVES = """--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel
    --expert-tensor-parallel-size 1"""
LOADS = (
    "--context-parallel-size 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --moe-grouped-gemm"
)
LOSSES = ("lm loss", "mtp_1 loss", "mtp_2 loss", "load_balancing_loss", "grad-norm")


@pytest.mark.parametrize(
    "output",
    [pytest.param("", marks=pytest.mark.slow), "--untie-embeddings-and-output-weights"],
    ids=["tied", "untied"],
)
def test_layouts_go_on_from_each_other(tmp_path: Path, output: str) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in ("alone", "saved", "loaded")]
    saved = f"--save {tmp_path / 'checkpoints'} --save-interval 2 --exit-interval 2"
    pretrain_gpt(1, f"{MODEL} {output} --metrics-jsonl {paths[0]}")
    pretrain_gpt(4, f"{MODEL} {output} {SAVES} {saved} --metrics-jsonl {paths[1]}")
    pretrain_gpt(2, f"{MODEL} {output} {LOADS} --load {tmp_path / 'checkpoints'} --metrics-jsonl {paths[2]}")
    alone, *both = ([[row[name] for name in LOSSES] for row in train_rows(path)] for path in paths)
    assert len(alone) == 4 and [len(rows) for rows in both] == [2, 2]
    for found, expected in zip(both[0] + both[1], alone):
        assert found == pytest.approx(expected, rel=1e-5)
