"""What parallel layouts make of two cores: pretrain_gpt.py in each of them, beside one process with two threads.

    python benchmarks/parallel_cpu.py --output benchmarks/results/parallel_cpu.json

Every round starts the program once in each layout, with the same model, batch and seed, and reads the trace of each
step (`--timeline`) but the first. The layouts of a round stand side by side, and a ratio is taken within its round, so
that other load on the machine meets all of them alike; numbers are medians over the rounds. Threads of one process
wait for each other without spinning (OMP_WAIT_POLICY), which would cost them most where others need the cores.

Other programs on the same cores make ranks wait for ranks that are preempted. So beside times by the clock stand
tokens per second of processor time, and the idle share of a pipeline as it would have been without them
(`megatron/training/timeline/undisturbed.py`). "even" is the share that the schedule itself has if all stages take the
mean time of each kind of computation: for 1F1B, (p - 1) / (m + p - 1) with p stages and m microbatches.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, write_result

LENGTH, LAYERS, MICROBATCHES = 256, 8, 4
FLAGS = f"""
    --num-layers {LAYERS} --num-attention-heads 4 --seq-length {LENGTH}
    --max-position-embeddings {LENGTH} --micro-batch-size 1 --global-batch-size {MICROBATCHES} --lr 1e-4 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 255 --attention-dropout 0 --hidden-dropout 0
    --cross-entropy-loss-fusion --eval-iters 0 --log-interval 1 --num-workers 0 --no-progress-bar
""".split()
"""Embedding and loss are small beside a stage, so that pipeline stages are equal."""
WARMUP = 2
"""Steps at the start of each run that are not measured."""
Rounds = dict[str, list[list[dict[str, Any]]]]
"""By layout: the measured steps of each round."""


@dataclass(frozen=True)
class Layout:
    """How the program is started."""

    name: str
    ranks: int = 2
    threads: int = 1
    flags: tuple[str, ...] = field(default=())

    @property
    def is_pipeline(self) -> bool:
        """Whether it has stages."""
        return "--pipeline-model-parallel-size" in self.flags


def _pipeline(name: str, *flags: str) -> Layout:
    return Layout(name, flags=("--pipeline-model-parallel-size", "2", *flags))


LAYOUTS = (
    Layout("one process, two threads", ranks=1, threads=2),
    Layout("one process, one thread", ranks=1),
    Layout("TP2", flags=("--tensor-model-parallel-size", "2")),
    Layout("TP2, sequence parallel", flags=("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    Layout("CP2", flags=("--context-parallel-size", "2")),
    Layout("DP2"),
    Layout("DP2, overlapped", flags=("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
    _pipeline("PP2 1f1b"),
    _pipeline("PP2 gpipe", "--pipeline-schedule", "gpipe"),
    _pipeline("PP2 interleaved", "--num-virtual-stages-per-pipeline-rank", "2"),
    _pipeline("PP2 zb-h1", "--pipeline-schedule", "zb-h1"),
)
BASE = LAYOUTS[0].name


# --- measuring ------------------------------------------------------------------------------------------


def run(layout: Layout, hidden: int, steps: int) -> list[dict[str, Any]]:
    """The numbers of each measured step of one start of the program."""
    with tempfile.TemporaryDirectory() as folder:
        traces = traces_of(layout, hidden, steps, Path(folder))
    return [{name: number and round(number, 5) for name, number in one["otherData"].items()} for one in traces]


def traces_of(layout: Layout, hidden: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """The traces of the measured steps of one start of the program, which leaves its pages in `folder`, too.

    Raises:
        RuntimeError: it failed; with the end of what each rank said.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    measured = range(WARMUP + 1, WARMUP + steps + 1)
    words = ["--hidden-size", str(hidden), *layout.flags, "--train-iters", str(WARMUP + steps)]
    words += ["--timeline", str(folder), "--timeline-step", *map(str, measured)]
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *FLAGS, *words]
    ranks = [_start(command, rank, layout, port, folder) for rank in range(layout.ranks)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        logs = "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(layout.ranks))
        raise RuntimeError(f"{layout.name} ended with {codes}:\n{logs}")
    return [json.loads((folder / f"step{step}.json").read_text()) for step in measured]


def _start(command: list[str], rank: int, layout: Layout, port: int, folder: Path) -> subprocess.Popen[bytes]:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.ranks, "MASTER_PORT": port}
    settings = {key: str(value) for key, value in launcher.items()}
    settings |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    settings |= {"OMP_NUM_THREADS": str(layout.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log)


def measure(layouts: list[Layout], hidden: int, rounds: int, steps: int, found: Rounds) -> None:
    """Add the steps of some rounds to those that have been found before."""
    for _ in range(rounds):
        for layout in layouts:
            measured = run(layout, hidden, steps)
            found.setdefault(layout.name, []).append(measured)
            seconds, number = median_of(measured, "seconds"), len(found[layout.name])
            print(f"round {number}, {layout.name}: {seconds:.3f} s a step", file=sys.stderr, flush=True)


# --- adding up ------------------------------------------------------------------------------------------


def median_of(steps: list[dict[str, Any]], name: str) -> float:
    """Of one number of several steps."""
    return statistics.median(step[name] for step in steps)


def summary(layout: Layout, rounds: list[list[dict[str, Any]]], base: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One line of the table: medians over rounds of the medians over their steps."""
    tokens = LENGTH * MICROBATCHES
    seconds = [median_of(steps, "seconds") for steps in rounds]
    processor = [median_of(steps, "processor seconds of all ranks") for steps in rounds]
    base_seconds = [median_of(steps, "seconds") for steps in base]
    base_processor = [median_of(steps, "processor seconds of all ranks") for steps in base]
    every = [step for steps in rounds for step in steps]
    row = {
        "layout": layout.name,
        "ranks": layout.ranks,
        "threads": layout.threads,
        "flags": " ".join(layout.flags),
        "tokens_per_second": statistics.median(tokens / s for s in seconds),
        "speed_to_base": statistics.median(b / s for b, s in zip(base_seconds, seconds)),
        "speed_to_base_of_rounds": [b / s for b, s in zip(base_seconds, seconds)],
        "tokens_per_processor_second": statistics.median(tokens / s for s in processor),
        "per_processor_second_to_base": statistics.median(b / s for b, s in zip(base_processor, processor)),
        "in_collectives": median_of(every, "in collectives"),
        "waiting_for_transfers": median_of(every, "waiting for transfers"),
        "processor_share_of_computations": median_of(every, "processor share of computations"),
    }
    return {**row, **(bubbles(every) if layout.is_pipeline else {})}


def bubbles(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Idle shares of a pipeline, and of its step that was disturbed least."""
    calmest = max(steps, key=lambda step: step["processor share of computations"])
    names = {
        "without transfers": "undisturbed bubble without transfers",
        "undisturbed": "undisturbed bubble",
        "even": "planned bubble with even stages",
        "by clock": "measured bubble",
    }
    found: dict[str, Any] = {name: median_of(steps, key) for name, key in names.items()}
    found["without transfers to even"] = statistics.median(
        step["undisturbed bubble without transfers"] / step["planned bubble with even stages"] for step in steps
    )
    found["calmest step"] = {name: calmest[key] for name, key in names.items()}
    found["calmest step"]["processor share"] = calmest["processor share of computations"]
    return {"bubble": found}


def show(rows: list[dict[str, Any]]) -> None:
    """Two tables: speed, and idle time of pipelines."""
    heads = ("tokens/s", "to base", "tokens/CPU-s", "to base", "collect.", "transf.", "CPU share")
    print(f"{'':26}" + "".join(f"{head:>13}" for head in heads))
    for row in rows:
        print(
            f"{row['layout']:26}{row['tokens_per_second']:13.1f}{row['speed_to_base']:13.2f}"
            f"{row['tokens_per_processor_second']:13.1f}{row['per_processor_second_to_base']:13.2f}"
            f"{row['in_collectives']:13.1%}{row['waiting_for_transfers']:13.1%}"
            f"{row['processor_share_of_computations']:13.1%}"
        )
    print(
        f"\n{'idle share':26}"
        + "".join(f"{head:>13}" for head in ("even", "no transfers", "ratio", "undisturbed", "by clock"))
    )
    for row in rows:
        if bubble := row.get("bubble"):
            shares = (bubble["undisturbed"], bubble["by clock"])
            first = (
                f"{bubble['even']:13.2%}{bubble['without transfers']:13.2%}{bubble['without transfers to even']:13.3f}"
            )
            print(f"{row['layout']:26}{first}" + "".join(f"{share:13.2%}" for share in shares))


def main() -> None:
    """Measure, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384, help="size of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="measured in each run")
    parser.add_argument("--layouts", nargs="+", choices=[layout.name for layout in LAYOUTS], help="only these")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--add", action="store_true", help="keep the rounds that are in --output already")
    args = parser.parse_args()
    layouts = [one for one in LAYOUTS if args.layouts is None or one.name in args.layouts]
    found: Rounds = json.loads(args.output.read_text())["all_steps"] if args.add and args.output.exists() else {}
    measure(layouts, args.hidden, args.rounds, args.steps, found)
    base = BASE if BASE in found else layouts[0].name
    rows = [summary(layout, found[layout.name], found[base]) for layout in LAYOUTS if layout.name in found]
    show(rows)
    if args.output:
        shape = {"layers": LAYERS, "hidden": args.hidden, "sequence": LENGTH, "microbatches": MICROBATCHES}
        settings = {**shape, "rounds": len(found[base]), "steps": args.steps, "base": base}
        write_result(args.output, settings=settings, layouts=rows, all_steps=found)


if __name__ == "__main__":
    main()
