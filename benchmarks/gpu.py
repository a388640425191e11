"""What one GPU computes, and how fast, in at most nine minutes: first whether it is right, then beside plain PyTorch.

    python benchmarks/gpu.py                        # writes benchmarks/results/gpu.json as it goes
    python benchmarks/gpu.py --rows gpt_2b moe_1b
    python benchmarks/gpu.py --device cpu --tiny    # the same program with tiny models: tests that it works

The gate (`gpu_gate.py`) compares every fused operation, every attention back end, the product in FP8 and a checkpoint
with plain fp64 on the CPU. Each row of the tables (`gpu_rows.py`) trains our model and its peer, one after the other,
each in a process of its own: one that fails, hangs or finds no memory is a line in the table and does not take the
others along. What matters most comes first; what is left out for want of time says so. The next process starts while
one is at work, so that all it needs is imported by its turn. Needs torch alone.

MFU is model FLOPs (forward and backward, no recompute) per second over the peak that the maker states. It is given
with causal attention counted as the half of the square that it needs, and as the whole square. Beside it stands the
share of the product of large matrices measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness
from benchmarks.gpu_gate_models import run_gate
from benchmarks.gpu_rows import ROWS, Work, measured
from megatron.core.fusions import compiled

GATE, GATE_SECONDS = "gate", 110.0
LEAST_SECONDS = 25.0
"""With less than this left nothing more is started."""
ANSWER = "answer: "

Found = dict[str, Any]


# --- one part, in a process of its own or in this one ---------------------------------------------------


def part(
    name: str,
    contender: str,
    device: str,
    tiny: bool,
    until: float,
    report: Callable[[Found], Any] = lambda found: None,
) -> Found:
    """What the gate or one contender of a row found; an error is one of the things to be found.

    Args:
        report: is told what has been found so far.
    """
    if tiny:
        compiled.BACKEND = "aot_eager"  # no C++ compiler is needed, and no time
    try:
        return gate(device, tiny, report) if name == GATE else measured(name, contender, device, tiny, until)
    except (Exception, SystemExit) as error:
        return {"said": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def gate(device: str, tiny: bool, report: Callable[[Found], Any]) -> Found:
    """The machine, its bandwidth, and the outcome of each check."""
    from benchmarks.training_steps import prepare_one_process

    prepare_one_process()
    ceiling = {"copy_gb_per_second": harness.copy_bandwidth(device, mib=8 if tiny else None) / 1e9}
    found: Found = {"machine": harness.machine(device) | ceiling, "outcomes": []}
    for outcome in run_gate(device):
        found["outcomes"].append({**asdict(outcome), "passed": outcome.passed})
        report(found)
    return found


def answer(found: Found) -> None:
    """Tell the process that waits for it."""
    print(ANSWER + json.dumps(found), flush=True)


class Worker:
    """A process that is ready for its part, and begins when it is told to. It does not outlive its time, nor do the
    processes that it starts."""

    def __init__(self, command: list[str]) -> None:
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        self._said, self._errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        # Files: the end of a pipe is not reached before the last compiler process has let go of it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )

    def run(self, seconds: float) -> Found:
        """The last answer, with what went wrong under "said"."""
        until = time.monotonic() + 0.8 * seconds  # the clock is the machine's
        with suppress(BrokenPipeError):  # it has ended already
            assert self._process.stdin is not None
            self._process.stdin.write(f"{until}\n".encode())
            self._process.stdin.flush()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {**(self._last_answer() or {}), "said": f"ended after {seconds:.0f} s"}
        finally:
            self.end()
        found = self._last_answer() or {}
        if self._process.returncode or not found:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["nothing"])[-1]
            found["said"] = f"the process ended with {self._process.returncode}: {last[:300]}"
        return found

    def _last_answer(self) -> Found | None:
        self._said.seek(0)
        answers = [line for line in self._said.read().splitlines() if line.startswith(ANSWER)]
        for line in reversed(answers):
            with suppress(ValueError):  # cut off
                return dict(json.loads(line.removeprefix(ANSWER)))
        return None

    def end(self) -> None:
        """It and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


# --- the whole ------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A part of the whole."""

    name: str
    """`GATE` or a row."""
    contender: str

    @property
    def seconds(self) -> float:
        """That it may take."""
        return GATE_SECONDS if self.name == GATE else ROWS[self.name].seconds


def steps_of(names: list[str]) -> list[Step]:
    """The gate, each row beside plain torch, then what is measured if time is left."""
    first = [Step(name, contender) for name in names for contender in ROWS[name].contenders]
    later = [Step(name, contender) for name in names for contender in ROWS[name].if_time_is_left]
    return [Step(GATE, "ours"), *first, *later]


class Run:
    """Everything of one call, written down after each part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.deadline = args, time.monotonic() + 60 * args.minutes
        self.result: Found = {"machine": {}, "gate": [], "rows": {}}

    def all(self, steps: list[Step]) -> bool:
        """Whether all is right; speed is no matter of right and wrong."""
        right, workers = True, dict[Step, Worker]()
        try:
            for step, after in zip(steps, [*steps[1:], None]):
                left = self.deadline - time.monotonic()
                if left < LEAST_SECONDS:
                    found = {"said": f"not tried: {max(left, 0):.0f} s are left"}
                elif self.args.in_process:
                    found = part(*step, self.args.device, self.args.tiny, time.monotonic() + step.seconds)
                else:
                    worker = workers.pop(step, None) or self._worker(step)
                    if after is not None:
                        workers[after] = self._worker(after)
                    found = worker.run(min(step.seconds, left))
                if step.name == GATE:
                    right = self.gate(found)
                else:
                    self.row(step, found)
        finally:
            for worker in workers.values():
                worker.end()
        return right

    def _worker(self, step: Step) -> Worker:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", *step, "--device", self.args.device]
        return Worker([*command, *["--tiny"] * self.args.tiny])

    def gate(self, found: Found) -> bool:
        """Whether all is right."""
        outcomes = found.get("outcomes", [])
        if "said" in found:
            outcomes.append({"name": "the gate", "passed": False, "said": found["said"]})
        self.result |= {"machine": found.get("machine", {}), "gate": outcomes}
        self.write()
        wrong = [one for one in outcomes if not one["passed"]]
        absent = [one for one in outcomes if one["passed"] and one["said"]]
        harness.say(
            f"gate: {len(outcomes) - len(wrong) - len(absent)} right, {len(wrong)} wrong, "
            f"{len(absent)} right or untried without a kernel of this device"
        )
        for one in wrong + absent:
            difference = "" if one.get("difference") is None else f"off by {one['difference']:.1e} "
            harness.say(f"  {one['name']} {one.get('type', '')}: {difference}{one['said']}")
        return not wrong

    def row(self, step: Step, found: Found) -> None:
        """What one contender did, and how it compares with those before it."""
        work, rows = ROWS[step.name], self.result["rows"]
        row = rows.setdefault(step.name, heading(work))
        before = {name: row.get(name) for name in RATIOS}
        row[step.contender] = found
        peer = row.get("plain", {}) if work.peer == "plain" else rows.get(work.peer or "", {}).get("ours", {})
        plain = row.get("plain") or (rows.get(work.peer or "", {}).get("plain", {}) if work.peer != "plain" else {})
        row["ratio"] = ratio(row["ours"], peer)
        row["ratio_to_plain"] = ratio(row["ours"], plain)
        row["ratio_to_transformers"] = ratio(row["ours"], row.get("transformers", {}))
        self.write()
        show(work, step.contender, found)
        for name in RATIOS:
            if row[name] not in (None, before[name]) and (name, work.peer) != ("ratio", "plain"):
                harness.say(f"  {row[name]:.2f} times {RATIOS[name](work)}")

    def write(self) -> None:
        """All that has been found so far."""
        if self.args.output:
            harness.write_result(self.args.output, **self.result)


def heading(work: Work) -> Found:
    """What a row says before anything is measured."""
    wanted = {"target_mfu": work.target_mfu, "target_ratio": work.target_ratio}
    return {"title": work.title, "flags": " ".join(work.flags.split()), "peer": work.peer, **wanted, "ours": {}}


def _wanted(ratio: float | None) -> str:
    return f" (wanted: {ratio})" if ratio else ""


RATIOS: dict[str, Callable[[Work], str]] = {
    "ratio": lambda work: f"{ROWS[work.peer].title if work.peer in ROWS else 'nothing'}{_wanted(work.target_ratio)}",
    "ratio_to_plain": lambda work: f"plain torch, compiled{_wanted(1.15)}",
    "ratio_to_transformers": lambda work: f"transformers, compiled{_wanted(1.5)}",
}
"""What ours is compared with."""


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> float | None:
    """Of tokens per second, where both were measured."""
    speeds = [one.get("tokens_per_second") for one in (ours, peer)]
    return None if None in speeds else speeds[0] / speeds[1]


def show(work: Work, contender: str, found: Found) -> None:
    """A line of the table."""
    if "tokens_per_second" not in found:
        harness.say(f"{work.title}: {contender}\n  {found['said']}")
        return
    mfu = " ".join(
        f"{found[name]:.1%} {text}"
        for name, text in (("mfu_causal_half", "MFU,"), ("mfu_causal_whole", "with whole attention,"))
        if found[name] is not None
    )
    harness.say(
        f"{work.title}: {contender}\n  {found['tokens_per_second']:.1f} tokens/s, "
        f"{1e3 * found['seconds_of_step']:.1f} ms a step, {found['peak_memory_gib']:.1f} GiB, {mfu} "
        f"{found['share_of_matmul_peak']:.1%} of a large product; {found['seconds_in_all']:.0f} s in all"
        f"{' ' + found['said'] if 'said' in found else ''}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models so small that a CPU does all in seconds")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=8.6, help="for everything but the imports at the start")
    parser.add_argument("--in-process", action="store_true", help="all parts in this process")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json, nowhere with --tiny")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output is None and not args.tiny:
        args.output = harness.RESULTS / "gpu.json"
    return args


def main() -> None:
    """Ends with status 1 if something is computed wrongly."""
    args = parse()
    if args.part:
        line = sys.stdin.readline()
        if line:
            answer(part(*args.part, args.device, args.tiny, float(line), answer))
        os._exit(0)  # nothing is left to be tidied up, and a device that failed may refuse to
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))  # so that processes in sessions of their own end, too
    sys.exit(not Run(args).all(steps_of(args.rows)))


if __name__ == "__main__":
    main()
