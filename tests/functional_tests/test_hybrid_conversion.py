"""tools/checkpoint/hybrid_conversion.py: a checkpoint of one layout trains on in another, to the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import train_rows
from tests.functional_tests.test_mamba import train
from tools.checkpoint import hybrid_conversion

FORMAT = "--ckpt-format torch --no-save-optim --no-save-rng --no-load-optim --no-load-rng "
PART = FORMAT + "--tensor-model-parallel-size 2"


@pytest.mark.slow
def test_another_layout_starts_from_the_same_weights(tmp_path: Path) -> None:
    saved, converted = tmp_path / "saved", tmp_path / "converted"
    train(2, f"{PART} --save {saved} --save-interval 2 --exit-interval 2")
    train(2, f"{PART} --load {saved} --metrics-jsonl {tmp_path / 'there'}")
    hybrid_conversion.main(
        ["--load-dir", str(saved), "--save-dir", str(converted), "--target-tp-size", "4", "--true-vocab-size", "61"]
    )
    train(4, f"{FORMAT} --tensor-model-parallel-size 4 --load {converted} --metrics-jsonl {tmp_path / 'here'}")
    losses = [[row["lm loss"] for row in train_rows(tmp_path / name)] for name in ("there", "here")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pipeline, words = tmp_path / "pipeline", ("--true-vocab-size", "61")
    hybrid_conversion.main(["--load-dir", str(converted), "--save-dir", str(pipeline), "--target-pp-size", "2", *words])
    train(2, f"{FORMAT} --pipeline-model-parallel-size 2 --load {pipeline} --metrics-jsonl {tmp_path / 'stages'}")
    assert [row["lm loss"] for row in train_rows(tmp_path / "stages")] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(SystemExit, match="--d-model 64: the checkpoint has 32; leave it out"):
        hybrid_conversion.main(["--load-dir", str(saved), "--save-dir", str(tmp_path / "x"), "--d-model", "64"])
    with pytest.raises(SystemExit, match=r"mamba_num_groups\) must be divisible by .*\(8\)"):
        hybrid_conversion.main(["--load-dir", str(saved), "--save-dir", str(tmp_path / "x"), "--target-tp-size", "8"])
