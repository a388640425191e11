"""Saving in the background: what was copied is what is written, nothing is published early, failures surface."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.manifest import damaged_files, read_manifest
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.background import BackgroundSaver, StagingBuffer
from megatron.core.dist_checkpointing.strategies.file_plan import FilePlan
from tests.worker_pool import run_ranks


def state(value: float) -> dict:
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = torch.full((3, 5), value + rank)
    return {
        "w": ShardedTensor.from_rank_offsets("w", rows, (0, rank, size)),
        "o": ShardedObject("o", [value], (size,), (rank,)),
        "n": value,
    }


def save_twice(folder: str, writer: str, persistent: bool, backend: str) -> None:
    saver, queue = BackgroundSaver(writer, persistent), AsyncCallsQueue(persistent)
    for number in (1, 2):
        directory = Path(folder) / str(number)
        if dist.get_rank() == 0:
            directory.mkdir()
        dist.barrier()
        contents = state(float(number))
        request = dist_checkpointing.save(
            contents, directory, (backend, 1), async_sharded_save=True, background_saver=saver
        )
        assert isinstance(request, AsyncRequest)
        contents["w"].data.fill_(-1)  # training goes on
        done: list[int] = []
        request.add_finalize_fn(lambda done=done: done.append(1))
        index = queue.schedule_async_request(request)
        assert not dist_checkpointing.check_is_distributed_checkpoint(directory)
        dist.barrier()  # else a fast rank could finish the save while another one has not looked yet
        if number == 1:
            deadline = time.monotonic() + 300
            while not queue.maybe_finalize_async_calls() and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            assert queue.maybe_finalize_async_calls(blocking=True) == [index]
        assert done == [1] and queue.get_num_unfinalized_calls() == 0
        records = read_manifest(directory)
        assert records is not None and damaged_files(directory, records) == []
        expected = state(float(number))
        request_back = {"w": state(0.0)["w"], "o": expected["o"].without_data()}
        loaded = dist_checkpointing.load(request_back, directory)
        assert torch.equal(loaded["w"], expected["w"].data) and loaded["o"] == [float(number)]
    saver.close()
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("writer", "persistent", "backend"),
    [("process", False, "torch_dist"), ("process", True, "safetensors"), ("thread", False, "torch_dist")],
)
def test_what_was_copied_is_what_is_written(tmp_path: Path, writer: str, persistent: bool, backend: str) -> None:
    run_ranks(2, save_twice, str(tmp_path), writer, persistent, backend)


def fail_on_one_rank(folder: str, failing: int) -> str:
    queue = AsyncCallsQueue()
    saver = BackgroundSaver("thread")
    request = dist_checkpointing.save(state(1.0), folder, async_sharded_save=True, background_saver=saver)
    assert request is not None
    if dist.get_rank() == failing:

        def fail() -> None:
            raise OSError(28, "No space left on device")

        request = request._replace(async_fn=fail)
    queue.schedule_async_request(request)
    try:
        queue.maybe_finalize_async_calls(blocking=True)
    except CheckpointingException as error:
        assert queue.get_num_unfinalized_calls() == 0
        return str(error)
    return ""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_surfaces_on_every_rank_and_publishes_nothing(tmp_path: Path, failing: int) -> None:
    messages = run_ranks(2, fail_on_one_rank, str(tmp_path), failing)
    assert messages == [f"cannot save: [Errno 28] No space left on device (rank {failing})"] * 2
    assert not dist_checkpointing.check_is_distributed_checkpoint(tmp_path)


def plan(name: str, fill: int, size: int = 10) -> FilePlan:
    return FilePlan(name, [b"head", torch.full((size,), fill, dtype=torch.uint8)])


def test_errors_of_the_writer_process_arrive_as_they_were(tmp_path: Path) -> None:
    saver = BackgroundSaver("process", persistent=True)
    staged = saver.stage([plan("a", 1)], tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere/a"):
        staged.write()
    staged = saver.stage([plan("a", 1)], tmp_path)  # the process survives its errors
    staged.write()
    assert (tmp_path / "a").read_bytes() == b"head" + bytes([1] * 10)
    saver.close()


def test_a_writer_process_that_dies_is_an_error_and_is_replaced(tmp_path: Path) -> None:
    saver = BackgroundSaver("process", persistent=True)
    saver.stage([plan("a", 1)], tmp_path).write()
    os.kill(saver._writer._process.pid, signal.SIGKILL)
    with pytest.raises(CheckpointingException, match="has died"):
        saver.stage([plan("b", 2)], tmp_path).write()
    saver.stage([plan("c", 3)], tmp_path).write()
    assert (tmp_path / "c").read_bytes() == b"head" + bytes([3] * 10)
    saver.close()


def test_memory_is_bounded_by_one_save(tmp_path: Path) -> None:
    saver = BackgroundSaver("thread")
    first = saver.stage([plan("a", 1, 5000), plan("b", 2, 5000)], tmp_path)
    assert saver._buffer is not None
    size = saver._buffer.size
    assert size == 4 * 4096  # two files, each rounded up to pages
    waiting = threading.Thread(target=lambda: saver.stage([plan("c", 3, 5000)], tmp_path).write())
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive(), "the second save must wait for the memory of the first"
    first.write()
    waiting.join(300)
    assert saver._buffer.size == size
    assert (tmp_path / "a").read_bytes() == b"head" + bytes([1] * 5000)
    assert (tmp_path / "c").read_bytes() == b"head" + bytes([3] * 5000)
    saver.close()


def test_memory_can_be_made_before_it_is_needed(tmp_path: Path) -> None:
    saver = BackgroundSaver("thread")
    saver.prepare(100_000)
    staged = saver.stage([plan("a", 1, 50_000)], tmp_path)
    assert saver._buffer is not None and saver._buffer.size == 25 * 4096, "nothing had to grow"
    staged.write()
    saver.stage([plan("b", 2, 200_000)], tmp_path).write()
    assert (tmp_path / "a").read_bytes() == b"head" + bytes([1] * 50_000)
    assert (tmp_path / "b").read_bytes() == b"head" + bytes([2] * 200_000)
    saver.close()


def test_every_kind_of_segment_is_copied() -> None:
    buffer = StagingBuffer()
    tensors = [torch.arange(6).reshape(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0)]
    files = buffer.copy_in([FilePlan("x", [b"ab", *tensors, b""])])
    content = bytes(buffer.view(files[0][1], files[0][2]))
    expected = b"ab" + tensors[0].contiguous().numpy().tobytes() + bytes([0xC0, 0x3F])
    assert content == expected
    buffer.close()


def test_requests_can_run_at_once() -> None:
    order: list[str] = []
    request = AsyncRequest(order.append, ("written",), [])
    request.add_finalize_fn(lambda: order.append("finished"))
    request.execute_sync()
    assert order == ["written", "finished"]
    with pytest.raises(RuntimeError, match="was scheduled"):
        request.freeze().add_finalize_fn(print)
