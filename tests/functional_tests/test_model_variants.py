"""Every variant of the model that flags offer trains alike on one process and on four (TP2 with sequences cut, PP2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows

ROPE = "--position-embedding-type rope"
VARIANTS = {
    "rope-partial": f"{ROPE} --rotary-percent 0.5 --rotary-base 5000",
    "rope-interleaved": f"{ROPE} --rotary-interleaved --no-rope-fusion",
    "rope-llama3": f"{ROPE} --use-rope-scaling --rope-scaling-factor 4",
    "rope-interpolated": f"{ROPE} --rotary-seq-len-interpolation-factor 2",
    "rope-skipped-in-some-layers": f"{ROPE} --no-rope-freq 2",
    "yarn": "--position-embedding-type yarn --yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 16",
    "no-positions": "--position-embedding-type none",
    "rmsnorm-1p": "--normalization RMSNorm --apply-layernorm-1p --norm-epsilon 1e-6",
    "squared-relu": "--squared-relu --disable-bias-linear --add-qkv-bias",
    "swiglu": "--swiglu --ffn-hidden-size 48 --no-bias-swiglu-fusion",
    "exact-gelu": "--no-bias-gelu-fusion",
    "multi-query-norm": "--group-query-attention --num-query-groups 2 --qk-layernorm --kv-channels 16",
    "window": "--window-size 5 0",
    "unfused": "--attention-backend unfused --apply-query-key-layer-scaling --attention-softmax-in-fp32",
    "post-layernorm-residual": "--apply-residual-connection-post-layernorm",
    "recompute-block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "recompute-selective": "--recompute-activations",
    "fused-loss": "--cross-entropy-loss-fusion --untie-embeddings-and-output-weights",
    "loss-in-pieces": "--cross-entropy-loss-fusion --cross-entropy-fusion-impl linear",
    "decoupled-lr": "--decoupled-lr 5e-4 --decoupled-min-lr 1e-5 --min-lr 1e-5",
    "weight-decay-ramp": "--weight-decay-incr-style cosine --start-weight-decay 0.01 --end-weight-decay 0.3",
    # An initialiser that looks at the shape sees the padded vocabulary: the same in both layouts only if it is.
    "xavier": "--init-method-xavier-uniform --vocab-size 63 --make-vocab-size-divisible-by 32",
    "unfused-wgrad": "--no-gradient-accumulation-fusion",
}
FOUR = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
UNEVEN = f"{FOUR} --decoder-first-pipeline-num-layers 1"


def losses(tmp_path: Path, name: str, world_size: int, flags: str) -> list[float]:
    path = tmp_path / f"{name}.jsonl"
    # weights large enough for every variant to matter
    exact = "--train-iters 4 --attention-dropout 0 --hidden-dropout 0 --lr-decay-style cosine --init-method-std 0.1"
    pretrain_gpt(world_size, f"{exact} {flags} --metrics-jsonl {path}")
    return [row["lm loss"] for row in train_rows(path)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the model without any of the variants."""
    return losses(tmp_path_factory.mktemp("plain"), "plain", 1, "")


SLOW = {"loss-in-pieces"}
SAME_NUMBERS = {"loss-in-pieces", "recompute-block", "recompute-selective", "unfused-wgrad", "unfused"}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
)
def test_four_processes_equal_one(variant: str, plain: list[float], tmp_path: Path) -> None:
    one = losses(tmp_path, "one", 1, VARIANTS[variant])
    four = losses(tmp_path, "four", 4, f"{VARIANTS[variant]} {FOUR}")
    assert four == pytest.approx(one, rel=1e-5)
    if variant not in SAME_NUMBERS:
        assert one != pytest.approx(plain, rel=1e-6)  # the flag does something: ten times what rounding does


@pytest.mark.parametrize("layout", [UNEVEN, f"{FOUR} --account-for-embedding-in-pipeline-split "
                                    "--account-for-loss-in-pipeline-split"])  # fmt: skip
def test_uneven_stages(layout: str, plain: list[float], tmp_path: Path) -> None:
    assert losses(tmp_path, "four", 4, layout) == pytest.approx(plain, rel=1e-5)
