"""`--ckpt-convert-format`: a run continues from the converted checkpoint as from the one it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.manifest import MANIFEST_FNAME
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from tests.functional_tests.program import pretrain_gpt, train_rows

LAYOUT = "--tensor-model-parallel-size 2 --use-distributed-optimizer --train-iters 4 --exit-interval 2"


def resumed(folder: Path, kind: str, *flags: str) -> list[float]:
    """Losses of the rest of the run, which loads that folder."""
    rows = folder.parent / f"{folder.name}-{kind}.jsonl"
    pretrain_gpt(
        2, f"{LAYOUT} --exit-interval 4 --load {folder} --ckpt-format {kind} --metrics-jsonl {rows} {' '.join(flags)}"
    )
    return [row["lm loss"] for row in train_rows(rows)]


def converted(folder: Path, kind: str, to: str) -> Path:
    """The folder of the same checkpoint in another format."""
    out = folder.parent / f"converted-{kind}"
    convert = f"--ckpt-convert-format {to} --ckpt-convert-save {out}"
    printed = pretrain_gpt(2, f"{LAYOUT} --load {folder} --ckpt-format {kind} {convert}")
    assert "> converted checkpoint:" in printed[0]
    assert "before the start of training step" not in printed[0]
    return out / to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, saved as torch_dist."""
    folder = tmp_path_factory.mktemp("run") / "saved"
    pretrain_gpt(2, f"{LAYOUT} --save {folder} --save-interval 2")
    return folder


def test_formats_hold_the_same_run(folder: Path) -> None:
    expected = resumed(folder, "torch_dist")
    assert len(expected) == 2
    as_torch = converted(folder, "torch_dist", "torch")
    assert (as_torch / "iter_0000002" / "mp_rank_01" / "distrib_optim.pt").is_file()
    assert resumed(as_torch, "torch") == expected
    again = converted(as_torch, "torch", "safetensors")
    assert (again / "iter_0000002" / "checkpoint.index.json").is_file()
    assert resumed(again, "safetensors") == expected


def test_older_state_of_the_distributed_optimizer(folder: Path) -> None:
    """Before February 2024 each buffer was a list of buckets under the key fp32."""
    expected = resumed(folder, "torch_dist")
    older = converted(folder, "torch_dist", "torch")
    for path in older.glob("iter_*/mp_rank_*/distrib_optim.pt"):
        state = safe_torch_load(path)
        [entry] = state[0].values()
        torch.save({0: {torch.float32: {name: [entry[name]] for name in ("param", "exp_avg", "exp_avg_sq")}}}, path)
        (path.parent.parent / MANIFEST_FNAME).unlink(missing_ok=True)
    assert resumed(older, "torch", "--ckpt-convert-update-legacy-dist-opt-format") == expected
