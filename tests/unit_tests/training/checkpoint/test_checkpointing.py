"""Resuming: bit for bit in the same layout, to rounding in another, never from half a checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing import load_plain_tensors
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.checkpoint.paths import begin_checkpoint, detect_format, publish_checkpoint
from megatron.training.checkpointing import (
    checkpoint_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    load_args_from_checkpoint,
    read_metadata,
)
from megatron.training.train_state import TrainState
from tests.unit_tests.training.checkpoint.tiny_run import BATCH, Plan, TinyRun
from tests.worker_pool import run_ranks

# ---- bit-exact resumption ----


def resumed_and_uninterrupted(plan: Plan, folder: str, **flags: Any) -> None:
    first = TinyRun(plan)
    first.train(2)
    first.save(folder)
    expected = first.train(2), first.weights()
    second = TinyRun(plan, seed=1000)
    second.load(folder, **flags)
    assert second.state == TrainState(2, 2 * BATCH, 0, 0, 2e6)
    results = second.train(2)
    assert results == expected[0]
    for name, weight in second.weights().items():
        assert torch.equal(weight, expected[1][name]), name


RESUMED = [
    Plan(),
    Plan(dist_opt=True),
    Plan(dtype=torch.bfloat16, dist_opt=True),
    Plan(dtype=torch.float16),
    Plan(tp=2, dp=2, dist_opt=True, sequence_parallel=True),
    Plan(pp=2, dp=2, dist_opt=True),
    Plan(tp=2, pp=2, dtype=torch.bfloat16),
    Plan(dp=2, dist_opt=True, fully_parallel=False),
]


@pytest.mark.parametrize("plan", RESUMED, ids=str)
@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_resuming_is_bit_exact_with_dropout(tmp_path: Path, plan: Plan, format: str) -> None:
    run_ranks(plan.size, resumed_and_uninterrupted, replace(plan, format=format), str(tmp_path))


def resumed_with_shared_reading(plan: Plan, folder: str) -> None:
    resumed_and_uninterrupted(plan, folder, ckpt_fully_parallel_load=True)


def test_resuming_is_bit_exact_when_ranks_read_for_each_other(tmp_path: Path) -> None:
    run_ranks(4, resumed_with_shared_reading, Plan(tp=2, dp=2), str(tmp_path))


# ---- other layouts ----


def save_after_training(plan: Plan, folder: str) -> list[Any]:
    run = TinyRun(plan)
    run.train(2)
    run.save(folder)
    return run.train(2)


def load_and_train(plan: Plan, folder: str) -> list[Any]:
    run = TinyRun(plan, seed=1000)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run.load(folder)
    assert run.state.iteration == 2
    assert (
        "random generators is ignored" in out.getvalue() or torch.distributed.get_rank() != 0 or plan.tp * plan.pp == 1
    )
    return run.train(2)


LAYOUTS = [
    Plan(dropout=0.0, dist_opt=True),
    Plan(dropout=0.0, tp=2, dp=2, dist_opt=True),
    Plan(dropout=0.0, tp=4, dist_opt=True),
    Plan(dropout=0.0, pp=2, dp=2, dist_opt=True),
    Plan(dropout=0.0, tp=2, pp=2, dist_opt=True, sequence_parallel=True),
    Plan(dropout=0.0, pp=4, dist_opt=True),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    folder = str(tmp_path_factory.mktemp("reference"))
    (results,) = run_ranks(1, save_after_training, LAYOUTS[0], folder)
    return folder, results


@pytest.mark.parametrize("plan", LAYOUTS[1:], ids=str)
def test_every_layout_continues_the_run_of_another(
    reference: tuple[str, list[Any]], tmp_path: Path, plan: Plan
) -> None:
    folder, expected = reference
    run_ranks(plan.size, save_after_training, plan, str(tmp_path))
    continued = run_ranks(plan.size, load_and_train, plan, folder)
    (back,) = run_ranks(1, load_and_train, LAYOUTS[0], str(tmp_path))
    for step in range(2):
        losses = [rank[step][0] for rank in continued if rank[step][0] is not None]
        losses = losses[: plan.tp * plan.dp : plan.tp]
        assert sum(losses) == pytest.approx(expected[step][0], rel=1e-5)
        assert continued[0][step][1] == pytest.approx(expected[step][1], rel=1e-4)
        assert back[step][0] == pytest.approx(expected[step][0], rel=1e-5)


# ---- other kinds of optimizers ----


KINDS = [
    Plan(dropout=0.0),
    Plan(dropout=0.0, tp=2, dp=2, dist_opt=True),
    Plan(dropout=0.0, pp=2, dtype=torch.bfloat16),
    Plan(dropout=0.0, dp=3, dist_opt=True, dtype=torch.bfloat16),
]


def optimizer_tensors(folder: str) -> dict[str, torch.Tensor]:
    tensors = load_plain_tensors(f"{folder}/iter_0000002")
    return {key: value for key, value in tensors.items() if key.startswith("optimizer.")}


def pass_on(plan: Plan, source: str, target: str) -> float:
    run = TinyRun(plan, seed=1000)
    run.load(source)
    assert {float(step) for step in all_steps(run)} == {2.0}
    run.save(target)
    return run.optimizer.param_groups[0]["lr"]


def all_steps(run: TinyRun) -> Iterator[torch.Tensor]:
    for state in run.optimizer.optimizer.state.values():
        yield state["step"]


@pytest.mark.parametrize("writer", KINDS, ids=str)
def test_state_passes_between_kinds_of_optimizers(tmp_path: Path, writer: Plan) -> None:
    run_ranks(writer.size, save_after_training, writer, str(tmp_path / "first"))
    first = optimizer_tensors(str(tmp_path / "first"))
    weights = load_plain_tensors(tmp_path / "first" / "iter_0000002")
    for number, reader in enumerate(KINDS):
        if reader == writer:
            continue
        rates = run_ranks(reader.size, pass_on, reader, str(tmp_path / "first"), str(tmp_path / str(number)))
        assert len(set(rates)) == 1
        for key, value in optimizer_tensors(str(tmp_path / str(number))).items():
            name = key.removeprefix("optimizer.state.fp32_param.")
            expected = first[key] if key in first else weights[name]
            assert torch.equal(value, expected), key


# ---- what is refused ----


def message_of_load(plan: Plan, folder: str, changes: dict[str, Any]) -> str:
    run = TinyRun(plan)
    before = run.weights()
    message = ""
    try:
        run.load(folder, **changes)
    except (CheckpointingException, FileNotFoundError, NotImplementedError) as error:
        message = f"{type(error).__name__}: {error}"
    for name, weight in run.weights().items():
        assert torch.equal(weight, before[name]), f"{name} was changed by a refused load"
    return message


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_another_architecture_is_refused_with_settings_and_shapes(tmp_path: Path, format: str) -> None:
    plan = Plan(format=format)
    run_ranks(1, save_after_training, plan, str(tmp_path))
    (message,) = run_ranks(1, message_of_load, replace(plan, hidden=32, layers=2), str(tmp_path), {})
    assert "hidden_size is 32 here and 16 in the checkpoint" in message
    assert "num_layers is 2 here and 4 in the checkpoint" in message
    if format == "torch_dist":
        assert "decoder.layers.self_attention.linear_qkv.weight: shape [4, 48, 16] in the checkpoint" in message
        assert "embedding.word_embeddings.weight: shape [48, 16] in the checkpoint, [48, 32] expected" in message
    changes = {"hidden_size": 16, "num_layers": 4}  # the flags agree, the model does not
    (message,) = run_ranks(1, message_of_load, replace(plan, hidden=32), str(tmp_path), changes)
    assert "[48, 16] in the checkpoint, [48, 32] expected" in message


def test_the_torch_format_needs_the_same_layout(tmp_path: Path) -> None:
    run_ranks(2, save_after_training, Plan(tp=2, format="torch"), str(tmp_path))
    messages = run_ranks(2, message_of_load, Plan(pp=2, format="torch"), str(tmp_path), {})
    for message in messages:
        assert "tensor_model_parallel_size is 1 here and 2 in the checkpoint" in message
        assert "pipeline_model_parallel_size is 2 here and 1 in the checkpoint" in message


def test_the_format_on_the_disk_must_be_expected_or_detected(tmp_path: Path) -> None:
    run_ranks(1, save_after_training, Plan(format="torch"), str(tmp_path))
    changes = {"ckpt_format": "torch_dist"}
    (message,) = run_ranks(1, message_of_load, Plan(), str(tmp_path), changes)
    assert "has format torch" in message and "--auto-detect-ckpt-format" in message
    changes["auto_detect_ckpt_format"] = True
    assert run_ranks(1, loads, Plan(), str(tmp_path), changes) == [2]


def loads(plan: Plan, folder: str, changes: dict[str, Any]) -> int:
    run = TinyRun(plan)
    run.load(folder, **changes)
    return run.state.iteration


def test_missing_parts_are_refused_and_can_be_left_out(tmp_path: Path) -> None:
    run_ranks(1, save_without, str(tmp_path), {"no_save_optim": True, "no_save_rng": True})
    (message,) = run_ranks(1, message_of_load, Plan(), str(tmp_path), {})
    assert "has no optimizer and no opt_param_scheduler" in message and "--no-load-optim" in message
    assert run_ranks(1, loads, Plan(), str(tmp_path), {"no_load_optim": True}) == [2]
    assert run_ranks(1, loads, Plan(), str(tmp_path), {"finetune": True}) == [0]


def save_without(folder: str, changes: dict[str, Any]) -> None:
    run = TinyRun(Plan())
    run.train(2)
    run.save(folder, **changes)


def test_sharded_optimizer_state_of_fixed_layout_is_refused_elsewhere(tmp_path: Path) -> None:
    plan = Plan(tp=2, dist_opt=True, fully_parallel=False)
    run_ranks(2, save_after_training, plan, str(tmp_path))
    messages = run_ranks(2, message_of_load, Plan(pp=2, dist_opt=True), str(tmp_path), {})
    assert all("--no-ckpt-fully-parallel-save" in message and "(2, 1)" in message for message in messages)


# ---- flags that say what to load ----


def choose(folder: str) -> None:
    run = TinyRun(Plan())
    run.train(1)
    run.save(folder)
    at_one = run.weights()
    run.train(1)
    run.save(folder)

    def loaded(**changes: Any) -> TinyRun:
        other = TinyRun(Plan(), seed=5)
        other.load(folder, **changes)
        return other

    assert loaded().state.iteration == 2
    early = loaded(ckpt_step=1)
    assert early.state.iteration == 1
    assert all(torch.equal(weight, at_one[name]) for name, weight in early.weights().items())
    with pytest.raises(CheckpointingException, match="iterations in .*: 1, 2"):
        loaded(ckpt_step=3)
    tuned = loaded(finetune=True)
    assert tuned.state == TrainState() and tuned.scheduler.num_steps == 0
    assert all(torch.equal(weight, run.weights()[name]) for name, weight in tuned.weights().items())
    elsewhere = loaded(load=folder + "/empty", pretrained_checkpoint=folder)
    assert elsewhere.state == TrainState()
    assert all(torch.equal(weight, run.weights()[name]) for name, weight in elsewhere.weights().items())
    with pytest.raises(CheckpointingException, match="neither --load"):
        loaded(load=folder + "/empty", pretrained_checkpoint=folder + "/empty")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert loaded(load=folder + "/empty").state == TrainState()
    assert "could not find the metadata file" in out.getvalue()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()):
        loaded(load=folder + "/empty", exit_on_missing_checkpoint=True)
    assert stop.value.code not in (0, None)
    state = torch.get_rng_state()
    fresh = TinyRun(Plan(), seed=5)
    state = torch.get_rng_state()
    fresh.load(folder, no_load_rng=True, no_load_optim=True)
    assert torch.equal(torch.get_rng_state(), state) and fresh.scheduler.num_steps == 0


def test_flags_choose_what_is_loaded(tmp_path: Path) -> None:
    run_ranks(1, choose, str(tmp_path))


def release(folder: str) -> None:
    run = TinyRun(Plan())
    run.train(1)
    run.save(folder)
    os.rename(f"{folder}/iter_0000001", f"{folder}/release")
    Path(get_checkpoint_tracker_filename(folder)).write_text("release\n")
    other = TinyRun(Plan(), seed=5)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        other.load(folder)
    assert f" loading release distributed checkpoint from {folder}\n" in out.getvalue()
    assert other.state == TrainState()
    assert all(torch.equal(weight, run.weights()[name]) for name, weight in other.weights().items())


def test_a_release_gives_weights_only(tmp_path: Path) -> None:
    run_ranks(1, release, str(tmp_path))


def test_messages_are_those_that_people_search_for(tmp_path: Path) -> None:
    (out,) = run_ranks(1, messages, str(tmp_path))
    assert out == [
        f"saving checkpoint at iteration       1 to {tmp_path} in torch_dist format",
        f"  successfully saved checkpoint from iteration       1 to {tmp_path} [ t 1/1, p 1/1 ]",
        f" loading distributed checkpoint from {tmp_path} at iteration 1",
        f"  successfully loaded checkpoint from {tmp_path} [ t 1/1, p 1/1 ] at iteration 1",
    ]


def messages(folder: str) -> list[str]:
    run = TinyRun(Plan())
    run.train(1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run.save(folder)
        run.load(folder)
    return out.getvalue().splitlines()


def test_arguments_are_taken_from_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(1, save_after_training, Plan(), str(tmp_path))
    args = Plan().arguments(str(tmp_path), num_layers=None, hidden_size=None, ckpt_format=None)
    saved = load_args_from_checkpoint(args)
    assert saved is not None and saved.consumed_train_samples == 2 * BATCH and saved.iteration == 2
    assert (args.num_layers, args.hidden_size, args.ckpt_format) == (4, 16, "torch_dist")
    args.load = str(tmp_path / "nowhere")
    assert load_args_from_checkpoint(args) is None


# ---- names, trackers, formats ----


def test_names() -> None:
    place = {"pipeline_parallel": True, "tensor_rank": 1, "pipeline_rank": 2}
    name = get_checkpoint_name("/c", 1000, **place, expert_parallel=True, expert_rank=3)
    assert name == "/c/iter_0001000/mp_rank_01_002_003/model_optim_rng.pt"
    assert get_checkpoint_name("/c", 7, return_base_dir=True) == "/c/iter_0000007"
    one = get_checkpoint_name("/c", 7, pipeline_parallel=False, tensor_rank=0, expert_parallel=False, release=True)
    assert one == "/c/release/mp_rank_00/model_optim_rng.pt"


@pytest.mark.parametrize(("text", "expected"), [("12\n", (12, False)), ("release", (0, True)), ("0", (0, False))])
def test_tracker(tmp_path: Path, text: str, expected: tuple[int, bool]) -> None:
    assert not checkpoint_exists(tmp_path) and not checkpoint_exists(None)
    tracker = Path(get_checkpoint_tracker_filename(tmp_path))
    tracker.write_text(text)
    assert checkpoint_exists(tmp_path) and read_metadata(tracker) == expected


@pytest.mark.parametrize("text", ["", "latest", "-3", "1.5", "1 2", "٣"])
def test_damaged_tracker(tmp_path: Path, text: str) -> None:
    tracker = Path(get_checkpoint_tracker_filename(tmp_path))
    tracker.write_text(text)
    with pytest.raises(CheckpointingException, match="must hold an iteration number or the word release"):
        read_metadata(tracker)


def test_formats_are_recognised(tmp_path: Path) -> None:
    with pytest.raises(CheckpointingException, match="is not a checkpoint"):
        detect_format(tmp_path)
    (tmp_path / ".metadata").touch()
    assert detect_format(tmp_path) == "torch_dcp"
    (tmp_path / "mp_rank_00").mkdir()
    assert detect_format(tmp_path) == "torch"


# ---- crashes ----


def test_leftovers_are_ignored_and_removed(tmp_path: Path) -> None:
    first = begin_checkpoint(tmp_path, 5)
    (first / "part").write_text("x")
    second = begin_checkpoint(tmp_path, 6)
    assert not first.exists()
    assert publish_checkpoint(second, 6) == tmp_path / "iter_0000006"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]


def test_a_checkpoint_can_be_replaced_and_an_interrupted_replacement_is_settled(tmp_path: Path) -> None:
    for text in ("old", "new"):
        directory = begin_checkpoint(tmp_path, 5)
        (directory / "content").write_text(text)
        publish_checkpoint(directory, 5)
    assert (tmp_path / "iter_0000005" / "content").read_text() == "new"
    os.rename(tmp_path / "iter_0000005", tmp_path / "iter_0000005.replaced")  # died between two renames
    begin_checkpoint(tmp_path, 6)
    assert (tmp_path / "iter_0000005" / "content").read_text() == "new"


def save_without_space(folder: str, format: str, failing: int) -> list[str]:
    """Error messages of two saves: with a rank that cannot write, and with a folder that cannot be
    written."""
    from megatron.core.dist_checkpointing.strategies import file_plan
    from megatron.training.checkpoint import torch_format

    run = TinyRun(Plan(tp=2, dist_opt=True, format=format))
    run.train(1)
    run.save(folder)
    module, name = (torch_format, "save_torch_file") if format == "torch" else (file_plan, "write_plans")
    original = getattr(module, name)

    def full(*args: Any) -> Any:
        original(*args)
        raise OSError(28, "No space left on device")

    run.state.iteration += 1
    if torch.distributed.get_rank() == failing:
        setattr(module, name, full)
    try:
        run.save(folder)
        texts = [""]
    except CheckpointingException as error:
        texts = [str(error)]
    finally:
        setattr(module, name, original)
    blocked = Path(folder) / "file"
    if torch.distributed.get_rank() == 0:
        blocked.touch()
    try:
        run.save(str(blocked / "deeper"))
    except CheckpointingException as error:
        texts.append(str(error))
    return texts


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_a_full_disk_stops_all_ranks_and_keeps_the_previous_checkpoint(
    tmp_path: Path, format: str, failing: int
) -> None:
    texts = run_ranks(2, save_without_space, str(tmp_path), format, failing)
    assert texts[0] == texts[1] and len(texts[0]) == 2
    assert f"No space left on device (rank {failing})" in texts[0][0]
    assert "Not a directory" in texts[0][1] or "File exists" in texts[0][1]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["file", "iter_0000001", "latest_checkpointed_iteration.txt"]
    assert run_ranks(2, loads, Plan(tp=2, dist_opt=True, format=format), str(tmp_path), {}) == [1, 1]
