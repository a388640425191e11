"""How much communication hides behind computation, kind by kind: pretrain_gpt.py with and without the flag for it.

    OMP_NUM_THREADS=1 python benchmarks/overlap_cpu.py                    # writes results/overlap_cpu.json
    python benchmarks/overlap_cpu.py --rounds 1 --timelines FOLDER        # keeps a page and a trace of each

Two ranks of one thread each over gloo. Every round starts the program without and with the flag, one after the other,
and reads the traces (`--timeline`) of some steps. Waiting is what a rank spends inside collectives or transfers of the
kind, hidden the share of that which the flag takes away: 1 - waiting with / waiting without, medians over steps and
rounds. In flight is the time from launch until waited for, beside it what the rank did meanwhile. gloo moves data with
the cores that compute, so that hiding a transfer slows the computation that it hides behind: the time of the step says
what is won in the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, say, write_result
from benchmarks.parallel_cpu import WARMUP, Layout, traces_of
from megatron.training.timeline.chrome_trace import IN_FLIGHT, PLANNED

HIDDEN = 384
SHARDED = "--use-distributed-optimizer --ddp-bucket-size 2000000"
REDUCED = f"{SHARDED} --overlap-grad-reduce"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
EXPERTS = """--num-experts 4 --moe-ffn-hidden-size 768 --moe-shared-expert-intermediate-size 768 --disable-bias-linear
    --moe-router-load-balancing-type none --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm --micro-batch-size 2 --global-batch-size 8"""
WAITS = ("collective", "point to point")

Event = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of communication."""

    title: str
    flag: str
    plain: str
    """Flags without it."""
    overlapped: str
    is_meant: Callable[[str], bool]
    """Whether a communication of this name is one."""


KINDS = {
    "gradients": Kind(
        "gradient reduce",
        "--overlap-grad-reduce",
        SHARDED,
        REDUCED,
        lambda name: name.startswith("reduce-scatter of gradients"),
    ),
    "weights": Kind(
        "parameter gather",
        "--overlap-param-gather",
        REDUCED,
        f"{REDUCED} --overlap-param-gather",
        lambda name: name.startswith("all-gather of weights"),
    ),
    "tensor": Kind(
        "tensor parallel",
        "--tp-comm-overlap",
        TENSOR,
        f"{TENSOR} --tp-comm-overlap",
        lambda name: "the tensor parallel ranks" in name and not name.startswith("all-reduce"),
    ),
    "pipeline": Kind(
        "pipeline p2p",
        "default; off: `--no-overlap-p2p-communication`",
        f"{PIPELINE} --no-overlap-p2p-communication",
        PIPELINE,
        lambda name: "of microbatch" in name,
    ),
    "experts": Kind(
        "expert all-to-all",
        "--moe-shared-expert-overlap",
        EXPERTS,
        f"{EXPERTS} --moe-shared-expert-overlap",
        lambda name: name.startswith("all-to-all"),
    ),
}


# --- reading a trace ------------------------------------------------------------------------------------


def covered(events: Iterable[Event]) -> float:
    """Milliseconds in which there is at least one of them."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        total += max(0.0, end - max(event["ts"], reached))
        reached = max(reached, end)
    return total / 1e3


def within(events: list[Event], others: list[Event]) -> float:
    """Milliseconds in which there is one of both."""
    return covered(events) + covered(others) - covered([*events, *others])


def numbers_of(trace: dict[str, Any], kind: Kind) -> dict[str, float]:
    """Milliseconds of a step, means over the ranks."""
    ranks: dict[int, list[Event]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["pid"] < PLANNED:
            ranks.setdefault(event["pid"], []).append(event)
    found = [numbers_of_rank(events, kind) for events in ranks.values()]
    numbers = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
    return {"step": 1e3 * trace["otherData"]["seconds"], **numbers}


def numbers_of_rank(events: list[Event], kind: Kind) -> dict[str, float]:
    """What one rank waited, had in flight, and did beside that."""
    waits = [event for event in events if event["cat"] in WAITS]
    flights = [event for event in events if event["cat"] == IN_FLIGHT and kind.is_meant(event["args"]["what"])]
    done = {
        "forward": [event for event in events if event["cat"] == "forward"],
        "backward": [event for event in events if event["cat"] in ("backward", "input gradient", "weight gradient")],
        "optimizer": [event for event in events if event["cat"] == "optimizer"],
    }
    beside = {f"beside {name}": within(flights, some) - within_all(flights, some, waits) for name, some in done.items()}
    waiting = covered(event for event in waits if kind.is_meant(event["args"]["what"]))
    return {"waiting": waiting, "in flight": covered(flights), **beside}


def within_all(flights: list[Event], some: list[Event], waits: list[Event]) -> float:
    """Milliseconds in which there is one of all three."""
    return within(pieces(flights, some), waits)


def pieces(events: list[Event], others: list[Event]) -> list[Event]:
    """Where events and others overlap."""
    found = []
    for one in events:
        for other in others:
            start = max(one["ts"], other["ts"])
            end = min(one["ts"] + one["dur"], other["ts"] + other["dur"])
            if start < end:
                found.append({"ts": start, "dur": end - start})
    return found


# --- measuring ------------------------------------------------------------------------------------------


def measure(name: str, rounds: int, steps: int, keep: Path | None) -> dict[str, Any]:
    """One line of the table."""
    kind = KINDS[name]
    found: dict[str, list[dict[str, float]]] = {"plain": [], "overlapped": []}
    for _ in range(rounds):
        for way, flags in (("plain", kind.plain), ("overlapped", kind.overlapped)):
            layout = Layout(f"{name}, {way}", flags=tuple(flags.split()))
            with tempfile.TemporaryDirectory() as folder:
                traces = traces_of(layout, HIDDEN, steps, Path(folder))
                found[way] += [numbers_of(trace, kind) for trace in traces]
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    for ending in ("html", "json"):
                        shutil.copy(Path(folder) / f"step{WARMUP + steps}.{ending}", keep / f"{name}_{way}.{ending}")
    medians = {
        way: {key: statistics.median(one[key] for one in some) for key in some[0]} for way, some in found.items()
    }
    plain, overlapped = medians["plain"], medians["overlapped"]
    row = {
        "title": kind.title,
        "flag": kind.flag,
        "flags": {"plain": " ".join(kind.plain.split()), "overlapped": " ".join(kind.overlapped.split())},
        "hidden": 1 - overlapped["waiting"] / plain["waiting"],
        "times_as_fast": plain["step"] / overlapped["step"],
        "milliseconds": medians,
        "all_steps": found,
    }
    hidden = f"hidden {row['hidden']:.0%}"
    say(f"{kind.title:18} waiting {plain['waiting']:7.1f} -> {overlapped['waiting']:7.1f} ms, {hidden}")
    say(f"{'':18} step    {plain['step']:7.1f} -> {overlapped['step']:7.1f} ms")
    return row


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="others stay as they were")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="measured in each run")
    parser.add_argument("--timelines", type=Path, help="keep the page and the trace of a step of each here")
    parser.add_argument("--output", type=Path, default=RESULTS / "overlap_cpu.json")
    args = parser.parse_args()
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else {}
    for name in args.kinds:
        rows[name] = measure(name, args.rounds, args.steps, args.timelines)
        settings = {"hidden": HIDDEN, "rounds": args.rounds, "steps": args.steps, "ranks": 2, "threads": 1}
        write_result(args.output, settings=settings, rows={name: rows[name] for name in KINDS if name in rows})


if __name__ == "__main__":
    main()
