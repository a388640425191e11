"""Verify a layout: run it and one process on this machine, and say how far they are apart."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from megatron.core import device
from megatron.training.settings import refuse_unless
from megatron.training.verify.compare import Bounds, Deviation, compare, spread, violations
from megatron.training.verify.measure import Measurement, Program, Samples, measure
from megatron.training.verify.shrink import Shrunk, shrink

SPREAD_RUNS = 4
"""Runs of one process in half precision, each with the sums of its matrix products in another order."""
SPREAD_FACTOR = 2.0
"""A layout may be this many times as far from float64 as the farthest of them. Measured: up to 1.4 times."""

Runner = Callable[[int, list[str], Samples, dict[str, Any]], Measurement]
"""(ranks, command line, samples, options of `measure`) -> what they measure together."""


@dataclass
class Comparison:
    """One layout in one precision."""

    precision: str
    deviations: list[Deviation]

    def lines(self) -> list[str]:
        """A table: quantity, measured, allowed, worst place."""
        rows = [("quantity", "measured", "allowed", "", "worst")]
        for d in self.deviations:
            verdict = "VIOLATED" if d.is_violation else "ok"
            rows.append((d.quantity, f"{d.found:.2e}", f"{d.allowed:.2e}", verdict, d.where))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return [
            "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]).rstrip()
            for row in rows
        ]


@dataclass
class Verdict:
    """What came of it."""

    command: Shrunk
    comparisons: list[Comparison]

    @property
    def holds(self) -> bool:
        """Whether every deviation is within what is allowed."""
        return not any(violations(comparison.deviations) for comparison in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "holds": self.holds,
            "ranks": self.command.ranks,
            "layout": self.command.words,
            "reference": self.command.reference,
            "changes": self.command.changes,
            "comparisons": {
                one.precision: [{**asdict(d), "violated": d.is_violation} for d in one.deviations]
                for one in self.comparisons
            },
        }


def verify(command: Shrunk, run: Runner) -> Verdict:
    """Compare the layout of `command` with one process in float64; in half precision too if it asks for that."""
    samples = Samples(command.uneven)
    reference = run(1, command.reference, samples, {"in_float64": True})
    comparisons = [Comparison("float32", compare(run(command.ranks, command.words, samples, {}), reference, Bounds()))]
    if command.half_precision is not None:
        comparisons.append(_half_precision(command, samples, run))
    return Verdict(command, comparisons)


def _half_precision(command: Shrunk, samples: Samples, run: Runner) -> Comparison:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[command.half_precision]  # type: ignore[index]
    flags = [f"--{name}"] + (["--loss-scale", "1024"] if name == "fp16" else [])
    exact = {"in_float64": True, "rounded_to": command.half_precision}
    reference = run(1, command.reference, samples, exact)
    orders = [{}, *({"reordered": seed} for seed in range(SPREAD_RUNS))]
    runs = [run(1, [*command.reference, *flags], samples, options) for options in orders]
    bounds = spread(runs, reference, SPREAD_FACTOR)
    found = run(command.ranks, [*command.words, *flags], samples, {})
    return Comparison(name, compare(found, reference, bounds))


def load_program(path: str | Path) -> Program:
    """A training program's model and forward step, from its file.

    Raises:
        ConfigurationError: it has none.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    refuse_unless(spec is not None and Path(path).is_file(), f"--program {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    for name in ("model_provider", "forward_step"):
        refuse_unless(hasattr(module, name), f"--program {path} has no {name}(...), which pretrain(...) takes")
    return program_of(module)


def program_of(module: Any) -> Program:
    """What a program's module tells: `model_provider`, `forward_step`, and what else is not GPT's."""
    defaults = {"model_type": Program.model_type, "args_defaults": {}}
    found = {name: getattr(module, name, default) for name, default in defaults.items()}
    return Program(module.model_provider, module.forward_step, **found)


# --- ranks of this machine ---


class RankError(RuntimeError):
    """A rank raised or died; the message holds its traceback."""


def on_this_machine(program: str | Path) -> Runner:
    """A runner that starts a process for each rank: on accelerators if there are as many, else on the CPU."""

    def run(ranks: int, words: list[str], samples: Samples, options: dict[str, Any]) -> Measurement:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            environment = _environment(rank, ranks, port)
            task = (theirs, environment, str(program), words, samples, options)
            processes.append(context.Process(target=_rank_main, args=task, daemon=True))
            pipes.append(ours)
            with _environment_set(environment):  # a device must be hidden before torch is imported
                processes[-1].start()
            theirs.close()
        try:
            return _first_result(pipes)
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()

    return run


def _first_result(pipes: Sequence[Any]) -> Measurement:
    """What rank 0 measured, once all ranks are done."""
    waiting, results = {pipe: rank for rank, pipe in enumerate(pipes)}, {}
    while waiting:
        for pipe in wait(list(waiting)):
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                error, result = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                error, result = "the process died", None
            if error:
                raise RankError(f"rank {rank} of {len(pipes)}:\n{error}")
            results[rank] = result
    return results[0]


def _rank_main(
    pipe: Any, environment: dict[str, str], program: str, words: list[str], samples: Samples, options: dict[str, Any]
) -> None:
    os.environ.update(environment)
    with tempfile.TemporaryFile("w+") as printed:  # a file of its own: those who print a crash need its descriptor
        try:
            if device.is_cpu():
                torch.set_num_threads(1)
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                result = measure(load_program(program), words, samples, **options)
            pipe.send((None, result))
        except BaseException:
            printed.seek(0)
            pipe.send((f"{printed.read()[-2000:]}\n{traceback.format_exc()}", None))
    pipe.close()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    found = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if device.is_cpu() or device.device_count() < ranks:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


@contextlib.contextmanager
def _environment_set(values: dict[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


__all__ = ["Comparison", "RankError", "Runner", "Verdict", "load_program", "on_this_machine", "shrink", "verify"]
