"""The errors that users of parallel training systems report most, one test each.

Cross-attention, whose keys come from another stage, has its test with the encoder-decoder model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from megatron.training.verify.batches import VALID_SHARES
from megatron.training.verify.compare import compare, gradient_deviations, violations
from megatron.training.verify.measure import Measurement
from tests.functional_tests.equivalence import axes, layouts
from tests.functional_tests.equivalence.axes import plain_row
from tests.functional_tests.equivalence.covering import Row
from tests.functional_tests.program import pretrain_gpt, train_rows
from tests.worker_pool import run_ranks

STEPS = 3


def found(row: Row) -> Measurement:
    return layouts.run(axes.num_ranks(row), axes.flags_of(row, STEPS), row["tokens"] == "uneven")


def reference(row: Row) -> Measurement:
    words, uneven = axes.reference_of(row, STEPS)
    return layouts.reference_run(tuple(words), uneven)


def check(row: Row) -> None:
    wrong = violations(compare(found(row), reference(row)))
    assert not wrong, [str(deviation) for deviation in wrong]


# --- losses normalised over the wrong tokens ---


@pytest.mark.parametrize("loss", ["per token", "per micro-batch"])
@pytest.mark.parametrize("layout", [{"dp": "2"}, {"dp": "2", "micro-batch": "2"}, {"cp": "2"}, {"pp": "2"}], ids=str)
def test_loss_with_uneven_tokens_across_microbatches_and_ranks(layout: dict[str, str], loss: str) -> None:
    """Samples count 0 to 32 of their tokens. Each token weighs the same, or each micro-batch does, on any rank."""
    check(plain_row(tokens="uneven", loss=loss) | layout)


def test_a_context_parallel_rank_whose_tokens_are_all_masked() -> None:
    """Of four ranks three hold no token that counts in some samples, and in one sample none does."""
    shares = [share * 32 for share in VALID_SHARES]
    assert 0 < min(filter(None, shares)) <= 4 < 8  # within the first of eight chunks, which is rank 0's
    assert 0.0 in shares
    for loss in ("per token", "per micro-batch"):
        check(plain_row(cp="4", tokens="uneven", loss=loss))


def test_loss_does_not_change_with_the_micro_batch_size() -> None:
    """All tokens count, or each token weighs the same: then how samples are grouped has no influence."""
    for row in (plain_row(), plain_row(tokens="uneven", loss="per token")):
        for size in ("1", "2"):
            for ranks in ("1", "2"):
                layout = row | {"micro-batch": size, "dp": ranks}
                assert axes.reference_of(layout, STEPS) == axes.reference_of(row, STEPS)
                check(layout)


# --- padded vocabulary ---


@pytest.mark.parametrize("layout", [{"tp": "4"}, {"tp": "2", "pp": "2"}, {"dp": "2", "sharding": "optimizer"}], ids=str)
@pytest.mark.parametrize("output", ["tied", "untied"])
def test_padded_vocabulary_in_softmax_and_gradient_norm(layout: dict[str, str], output: str) -> None:
    """61 words padded to 256 on four ranks (three of which hold nothing else) are the 61 words without padding."""
    row = plain_row(vocabulary="mostly padding", output=output) | layout
    words, uneven = axes.reference_of(row, STEPS)
    unpadded = layouts.reference_run((*words, "--make-vocab-size-divisible-by", "1"), uneven)
    padded = found(row)
    assert padded.initial.tensors["embedding.word_embeddings.weight"].shape[0] == 61
    assert padded.padding_gradient == 0.0
    assert not violations(compare(padded, unpadded))


# --- parameters that several ranks hold ---

SHARED = {
    "tied embeddings, two stages": ({"pp": "2"}, ["embedding.word_embeddings.weight"]),
    "tied embeddings, four stages and vocabulary ranks": (
        {"pp": "4", "tp": "2"},
        ["embedding.word_embeddings.weight"],
    ),
    "tied embeddings, distributed optimizer": (
        {"pp": "2", "dp": "2", "sharding": "optimizer"},
        ["embedding.word_embeddings.weight"],
    ),
    "norms and biases under sequence parallelism": (
        {"tp": "2", "sp": "on"},
        ["input_layernorm.weight", "pre_mlp_layernorm.bias", "linear_proj.bias", "linear_fc2.bias", "final_layernorm"],
    ),
    "replicated norms and biases without it": (
        {"tp": "2"},
        ["input_layernorm.weight", "pre_mlp_layernorm.bias", "linear_proj.bias", "linear_fc2.bias", "final_layernorm"],
    ),
    "norms of heads": ({"tp": "2", "block": "llama"}, ["q_layernorm", "k_layernorm"]),
    "norms of heads under sequence parallelism": (
        {"tp": "2", "sp": "on", "block": "llama"},
        ["q_layernorm", "k_layernorm"],
    ),
    "positions": ({"tp": "2", "sp": "on"}, ["position_embeddings"]),
    "positions, cut sequences": ({"cp": "2"}, ["position_embeddings", "layernorm"]),
}


@pytest.mark.parametrize("case", list(SHARED))
def test_gradients_of_shared_parameters_are_summed_once(case: str) -> None:
    layout, parts = SHARED[case]
    row = plain_row() | layout
    one, many = reference(row), found(row)
    deviations = gradient_deviations(many, one)
    for part in parts:
        names = [name for name in deviations if part in name]
        assert names, f"the model has no {part}"
        for name in names:
            assert numpy.linalg.norm(one.gradients.tensors[name]) > 0
            assert deviations[name] < 1e-5, name
    assert many.gradients.disagreement[0] == many.final.disagreement[0] == 0.0


# --- collectives in the wrong group ---


def collectives_of_a_run(words: list[str]) -> list[tuple[str, tuple[int, ...], int, str]]:
    """(operation, global ranks of the group, elements, type) of every collective of a run, in order."""
    seen: list[tuple[str, tuple[int, ...], int, str]] = []

    def watched(name: str, right: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            seen.append((name, ranks, tensor.numel(), str(tensor.dtype)))
            return right(*args, **kwargs)

        return collective

    from megatron.core import collectives

    changed = [(collectives, "_all_gather"), (collectives, "_reduce_scatter")]
    changed += [(dist, name) for name in ("all_reduce", "broadcast", "all_to_all_single")]
    before = [getattr(owner, name) for owner, name in changed]
    for (owner, name), right in zip(changed, before):
        setattr(owner, name, watched(name, right))
    try:
        layouts.run_here(words, False, {})
    finally:
        for (owner, name), right in zip(changed, before):
            setattr(owner, name, right)
    return seen


def test_every_collective_is_in_the_group_of_its_stage_and_replica() -> None:
    """TP2, PP2, DP2: rank = tensor + 2 · data + 4 · stage. Groups are those of arithmetic, and their members agree."""
    row = plain_row(tp="2", pp="2", dp="2", sharding="optimizer", loss="per token")
    ledgers = run_ranks(8, collectives_of_a_run, axes.flags_of(row, STEPS))
    for rank, ledger in enumerate(ledgers):
        tensor, data, stage = rank % 2, rank // 2 % 2, rank // 4
        allowed = {
            "tensor": tuple(t + 2 * data + 4 * stage for t in range(2)),
            "data": tuple(tensor + 2 * d + 4 * stage for d in range(2)),
            "pipeline": tuple(tensor + 2 * data + 4 * s for s in range(2)),
            "tensor x pipeline": tuple(t + 2 * data + 4 * s for s in range(2) for t in range(2)),
            "all": tuple(range(8)),
        }
        used = {ranks for _, ranks, _, _ in ledger}
        assert used <= set(allowed.values()), f"rank {rank} used {used - set(allowed.values())}"
        # Gradients and weights travel over the data group alone, activations over the tensor group.
        assert {ranks for name, ranks, _, _ in ledger if name == "_reduce_scatter"} == {allowed["data"]}
        large = {ranks for name, ranks, size, _ in ledger if name == "_all_gather" and size > 1000}
        assert large == {allowed["data"]}
        assert (("all_reduce", allowed["tensor"], 32 * 32, "torch.float32")) in ledger
    for group in {ranks for ledger in ledgers for _, ranks, _, _ in ledger}:
        of_members = [[entry for entry in ledgers[rank] if entry[1] == group] for rank in group]
        assert all(entries == of_members[0] for entries in of_members), f"the ranks {group} disagree"


# --- overlap ---


@pytest.mark.parametrize("pp", ["1", "2"])
def test_no_stale_weights_under_overlapped_gathers(pp: str) -> None:
    """Each step, and the evaluation after the last, sees what the optimizer made of the weights before."""
    row = plain_row(dp="2", pp=pp, sharding="optimizer", overlap="gradients and weights")
    one = reference(row)
    assert len(set(numpy.round(one.losses, 4))) == STEPS  # every step changes something
    check(row)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved 2"])
def test_postponed_gradients_are_there_before_they_are_reduced(schedule: str) -> None:
    """The vocabulary's product waits for the end of the pipeline; its bucket is not reduced before."""
    later = {"weight gradients": "those of the vocabulary later"}
    check(plain_row(pp="2", schedule=schedule, overlap="gradients", output="untied") | later)


# --- logging ---


def test_metrics_are_counted_once_in_logging(tmp_path: Path) -> None:
    """What 8 ranks log is what one logs: each step once, losses averaged, samples and norms not multiplied."""
    flags = (
        "--attention-dropout 0 --hidden-dropout 0 --train-iters 4 --log-interval 2 --log-params-norm "
        "--log-validation-ppl-to-tensorboard --eval-iters 2 --eval-interval 2 --global-batch-size 8"
    )
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer"
    files = [tmp_path / "one.jsonl", tmp_path / "eight.jsonl"]
    pretrain_gpt(1, f"{flags} --metrics-jsonl {files[0]}")
    pretrain_gpt(8, f"{flags} {layout} --metrics-jsonl {files[1]}")
    one, eight = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(one) == len(eight)
    for a, b in zip(one, eight):
        timings = {name for name in a if "time" in name or "per" in name and "sec" in name or "throughput" in name}
        assert a.keys() == b.keys()
        for name in a.keys() - timings:
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
    assert [row["iteration"] for row in train_rows(files[1])] == [1, 2, 3, 4]
    assert [row["consumed_samples"] for row in train_rows(files[1])] == [8, 16, 24, 32]
