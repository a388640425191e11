"""Training in fp8 runs in every layout, and layouts stay as close as roundings to fp8 let them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, run_program, train_rows
from tests.functional_tests.sentences import write_sentences
from tests.worker_pool import RankFailure, run_ranks

COMMON = "--train-iters 6 --lr 3e-3 --attention-dropout 0 --hidden-dropout 0 --bf16"
EXPERTS = "--num-experts 4 --disable-bias-linear --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0"
DELAYED, TENSOR, BLOCKS = (f"--fp8-format hybrid --fp8-recipe {name}" for name in ("delayed", "tensorwise", "mxfp8"))
SLOW = pytest.mark.slow
LAYOUTS = [
    (2, DELAYED, "", "--tensor-model-parallel-size 2 --sequence-parallel"),
    pytest.param(2, TENSOR, "", "--context-parallel-size 2", marks=SLOW),
    pytest.param(2, DELAYED, "", "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1", marks=SLOW),
    pytest.param(4, TENSOR, "", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", marks=SLOW),
    pytest.param(2, BLOCKS, "", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", marks=SLOW),
    pytest.param(
        2,
        DELAYED,
        "--untie-embeddings-and-output-weights",
        "--use-torch-fsdp2 --no-gradient-accumulation-fusion",
        marks=SLOW,
    ),
    pytest.param(2, DELAYED, EXPERTS, "--expert-model-parallel-size 2 --moe-grouped-gemm", marks=SLOW),
    pytest.param(4, TENSOR, EXPERTS, "--tensor-model-parallel-size 2 --sequence-parallel", marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "recipe", "model", "layout"), LAYOUTS)
def test_layouts_train_alike(ranks: int, recipe: str, model: str, layout: str, tmp_path: Path) -> None:
    losses = []
    for name, number, flags in (("one", 1, recipe), ("layout", ranks, f"{recipe} {layout}"), ("bf16", 1, "")):
        metrics = tmp_path / f"{name}.jsonl"
        pretrain_gpt(number, f"{COMMON} {model} {flags} --metrics-jsonl {metrics}")
        losses.append([row["lm loss"] for row in train_rows(metrics)])
    one, other, bf16 = losses
    assert one != bf16, "nothing was rounded to fp8"
    assert other == pytest.approx(one, rel=5e-3)
    assert one == pytest.approx(bf16, rel=5e-3)


DISTRIBUTED = "--use-distributed-optimizer --fp8-amax-history-len 3 --fp8-amax-compute-algo max"
OVERLAP = "--clip-grad 0 --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4000"


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(1, f"{DELAYED} {DISTRIBUTED} {EXPERTS} --moe-grouped-gemm", marks=SLOW),
        # Without clipping, which follows the norm.
        pytest.param(2, f"{DELAYED} {DISTRIBUTED} {OVERLAP}", marks=SLOW),
        pytest.param(2, f"{TENSOR} --use-distributed-optimizer --clip-grad 0", marks=SLOW),
        pytest.param(
            2, f"{DELAYED} {DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel --clip-grad 0", marks=SLOW
        ),
        pytest.param(
            2,
            f"{DELAYED} {DISTRIBUTED} {EXPERTS} --moe-grouped-gemm --expert-model-parallel-size 2 --clip-grad 0",
            marks=SLOW,
        ),
        pytest.param(
            2,
            f"{DELAYED} {DISTRIBUTED} {OVERLAP} --pipeline-model-parallel-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2 --overlap-param-gather-with-optimizer-step "
            "--ckpt-format torch",
            marks=SLOW,
        ),
    ],
)
def test_keeping_weights_in_fp8_changes_no_bit(ranks: int, flags: str, tmp_path: Path) -> None:
    (losses, norms), (kept, norms_kept) = (
        zip(*curve(tmp_path, ranks, f"{flags} {more}")) for more in ("", "--fp8-param-gather")
    )
    assert kept == losses
    assert norms_kept == pytest.approx(norms, rel=1e-6), "the order in which a norm is summed is the ranks' own"


def curve(folder: Path, ranks: int, flags: str) -> list[tuple[float, ...]]:
    """(loss, norm of the gradients) of each step."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    pretrain_gpt(ranks, f"{COMMON} {flags} --metrics-jsonl {metrics}")
    return [(row["lm loss"], row["grad-norm"]) for row in train_rows(metrics)]


def test_runs_with_and_without_weights_in_fp8_load_each_other(tmp_path: Path) -> None:
    flags = f"{DELAYED} {DISTRIBUTED}"
    wide, kept = tmp_path / "wide", tmp_path / "kept"
    whole = curve(tmp_path, 1, f"{flags} --save {wide} --save-interval 3")
    found = curve(tmp_path, 1, f"{flags} --fp8-param-gather --save {kept} --save-interval 3")
    assert found == whole, "saving changed the run"
    for folder, more in ((kept, ""), (wide, "--fp8-param-gather")):
        resumed = curve(tmp_path, 1, f"{flags} {more} --load {folder} --ckpt-step 3")
        assert resumed == whole[3:], f"{folder.name} -> {more or 'no flag'}"


@pytest.mark.slow
def test_files_that_describe_buffers_load_with_the_same_flag_only(tmp_path: Path) -> None:
    flags = f"{DELAYED} {DISTRIBUTED} --ckpt-format torch"
    whole = curve(tmp_path, 1, f"{flags} --fp8-param-gather --save {tmp_path} --save-interval 3")
    load = f"--load {tmp_path} --ckpt-step 3"
    assert curve(tmp_path, 1, f"{flags} --fp8-param-gather {load}") == whole[3:]
    with pytest.raises(RankFailure, match="was saved with --fp8-param-gather, which format torch cannot change"):
        curve(tmp_path, 1, f"{flags} {load}")
    curve(tmp_path, 1, f"{flags} {load} --no-load-optim")


SMALL = "--micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --num-workers 0 --eval-iters 0 --log-interval 1"
WIDTHS = "--hidden-size 32 --num-attention-heads 4 --hidden-dropout 0 --attention-dropout 0 --split 90,5,5"
FAMILIES = {
    "bert": "--num-layers 2 --seq-length 48 --max-position-embeddings 48",
    "t5": "--encoder-num-layers 2 --decoder-num-layers 2 --encoder-seq-length 48 --decoder-seq-length 32 "
    "--max-position-embeddings 48 --vocab-extra-ids 20",
    "mamba": "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec --is-hybrid-model --num-layers 4 "
    "--hybrid-override-pattern M*-M --mamba-num-groups 1 --mamba-head-dim 16 --mamba-state-dim 16 --seq-length 48 "
    "--max-position-embeddings 48 --position-embedding-type none --tokenizer-type NullTokenizer --vocab-size 60",
}


@pytest.mark.parametrize("family", ["mamba", pytest.param("bert", marks=SLOW), pytest.param("t5", marks=SLOW)])
def test_other_models_learn_as_in_bf16(family: str, tmp_path: Path) -> None:
    if family == "mamba":
        data = "--mock-data"
    else:
        found = write_sentences(tmp_path)
        data = f"--data-path {found['data']} --vocab-file {found['vocab']} --data-cache-path {tmp_path / 'cache'}"
    losses = []
    for flags in ("", f"{DELAYED} --use-distributed-optimizer --fp8-param-gather"):
        metrics = tmp_path / f"{bool(flags)}.jsonl"
        words = f"{FAMILIES[family]} {SMALL} {WIDTHS} --train-iters 6 --bf16 --no-progress-bar {data} {flags}"
        run_ranks(1, run_program, f"pretrain_{family}.py", [*words.split(), "--metrics-jsonl", str(metrics)])
        losses.append([row["lm loss"] for row in train_rows(metrics)])
    bf16, fp8 = losses
    assert bf16[-1] < bf16[0]
    assert fp8 != bf16, "nothing was rounded to fp8"
    assert fp8 == pytest.approx(bf16, rel=3e-3)
