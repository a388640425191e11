"""What one GPU computes, and how fast, in at most nine minutes: first whether it is right, then beside plain PyTorch.

    python benchmarks/gpu.py                        # writes benchmarks/results/gpu.json as it goes
    python benchmarks/gpu.py --rows gpt_2b moe_1b
    python benchmarks/gpu.py --device cpu --tiny    # the same program with tiny models: tests that it works

The gate (`gpu_gate.py`) compares every fused operation, every attention back end, the product in FP8 and a checkpoint
with plain fp64 on the CPU. Each row of the tables (`gpu_rows.py`) trains our model and its peer, one after the other,
each in a process of its own: one that fails, hangs or finds no memory is a line in the table and does not take the
others along. Needs torch alone.

MFU is model FLOPs (forward and backward, no recompute) per second over the peak that the maker states. It is given
with causal attention counted as the half of the square that it needs, and as the whole square. Beside it stands the
share of the product of large matrices measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness
from benchmarks.gpu_gate_models import run_gate
from benchmarks.gpu_rows import ROWS, Work, measured
from megatron.core.fusions import compiled

GATE, GATE_SECONDS = "gate", 90.0
LEAST_SECONDS = 25.0
"""With less than this left nothing more is started."""
ANSWER = "answer: "


# --- one part, in a process of its own or in this one ---------------------------------------------------


def part(name: str, contender: str, device: str, tiny: bool, until: float) -> dict[str, Any]:
    """What the gate or one contender of a row found; an error is one of the things to be found."""
    if tiny:
        compiled.BACKEND = "aot_eager"  # no C++ compiler is needed, and no time
    try:
        if name == GATE:
            from benchmarks.training_steps import prepare_one_process

            prepare_one_process()
            outcomes = [{**asdict(outcome), "passed": outcome.passed} for outcome in run_gate(device)]
            ceiling = {"copy_gb_per_second": harness.copy_bandwidth(device, mib=8 if tiny else None) / 1e9}
            return {"machine": harness.machine(device) | ceiling, "outcomes": outcomes}
        return measured(name, contender, device, tiny, until)
    except (Exception, SystemExit) as error:
        return {"said": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def apart(name: str, contender: str, device: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """`part` in a new process that is ended after `seconds`."""
    until = time.monotonic() + 0.8 * seconds  # the clock is the machine's
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, contender, "--until", str(until)]
    command += ["--device", device, *["--tiny"] * tiny]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"said": f"ended after {seconds:.0f} s"}
    answers = [line.removeprefix(ANSWER) for line in ended.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        last = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"said": f"the process ended with {ended.returncode}: {last[:300]}"}
    return json.loads(answers[-1])


# --- the whole ------------------------------------------------------------------------------------------


class Run:
    """Everything of one call, written down after each part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.deadline = args, time.monotonic() + 60 * args.minutes
        self.result: dict[str, Any] = {"machine": {}, "gate": [], "rows": {}}

    def find(self, name: str, contender: str, seconds: float) -> dict[str, Any]:
        """A part, as long as there is time for it."""
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            return {"said": f"not tried: {max(left, 0):.0f} s are left"}
        seconds = min(seconds, left)
        if self.args.in_process:
            return part(name, contender, self.args.device, self.args.tiny, time.monotonic() + seconds)
        return apart(name, contender, self.args.device, self.args.tiny, seconds)

    def gate(self) -> bool:
        """Whether all is right."""
        found = self.find(GATE, "ours", GATE_SECONDS)
        outcomes = found.get("outcomes", [{"name": "the gate", "passed": False, "said": found.get("said", "")}])
        self.result |= {"machine": found.get("machine", {}), "gate": outcomes}
        self.write()
        wrong = [one for one in outcomes if not one["passed"]]
        absent = [one for one in outcomes if one["passed"] and one["said"]]
        harness.say(
            f"gate: {len(outcomes) - len(wrong) - len(absent)} right, {len(wrong)} wrong, {len(absent)} missing"
        )
        for one in wrong + absent:
            difference = "" if one.get("difference") is None else f"off by {one['difference']:.1e}"
            harness.say(f"  {one['name']} {one.get('type', '')}: {difference}{one['said']}")
        return not wrong

    def row(self, name: str) -> None:
        """Ours and its peer."""
        work = ROWS[name]
        row: dict[str, Any] = {"title": work.title, "flags": " ".join(work.flags.split())}
        row |= {"target_mfu": work.target_mfu, "target_ratio": work.target_ratio}
        self.result["rows"][name] = row
        for contender in ("ours", *["plain"] * (work.peer == "plain")):
            row[contender] = self.find(name, contender, work.seconds)
            self.write()
        peer = row["plain"] if work.peer == "plain" else self.result["rows"].get(work.peer or "", {}).get("ours", {})
        row["ratio"] = ratio(row["ours"], peer)
        if work.beside_transformers:
            row["transformers"] = self.find(name, "transformers", work.seconds)
            row["ratio_to_transformers"] = ratio(row["ours"], row["transformers"])
        self.write()
        show(work, row)

    def write(self) -> None:
        """All that has been found so far."""
        if self.args.output:
            harness.write_result(self.args.output, **self.result)


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> float | None:
    """Of tokens per second, where both were measured."""
    speeds = [one.get("tokens_per_second") for one in (ours, peer)]
    return None if None in speeds else speeds[0] / speeds[1]


def show(work: Work, row: dict[str, Any]) -> None:
    """Lines of the table."""
    harness.say(work.title)
    for contender in ("ours", "plain", "transformers"):
        found = row.get(contender)
        if found is None:
            continue
        if "tokens_per_second" not in found:
            harness.say(f"  {contender:12} {found['said']}")
            continue
        mfu = " ".join(
            f"{found[name]:.1%} {text}"
            for name, text in (("mfu_causal_half", "MFU,"), ("mfu_causal_whole", "with whole attention,"))
            if found[name] is not None
        )
        harness.say(
            f"  {contender:12} {found['tokens_per_second']:11.1f} tokens/s {1e3 * found['seconds_of_step']:9.1f} ms "
            f"{found['peak_memory_gib']:7.1f} GiB {mfu} {found['share_of_matmul_peak']:.1%} of a large product"
            f"{' ' + found['said'] if 'said' in found else ''}"
        )
    if row["ratio"] is not None:
        against = "plain torch, compiled" if work.peer == "plain" else ROWS[work.peer or ""].title
        wanted = f" (wanted: {work.target_ratio})" if work.target_ratio else ""
        harness.say(f"  {row['ratio']:.2f} times {against}{wanted}")
    if row.get("ratio_to_transformers") is not None:
        harness.say(f"  {row['ratio_to_transformers']:.2f} times transformers, compiled (wanted: 1.5)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models so small that a CPU does all in seconds")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything")
    parser.add_argument("--in-process", action="store_true", help="all parts in this process")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json, nowhere with --tiny")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output is None and not args.tiny:
        args.output = harness.RESULTS / "gpu.json"
    return args


def main() -> None:
    """Ends with status 1 if something is computed wrongly."""
    args = parse()
    if args.part:
        print(ANSWER + json.dumps(part(*args.part, args.device, args.tiny, args.until)), flush=True)
        os._exit(0)  # nothing is left to be tidied up, and a device that failed may refuse to
    run = Run(args)
    right = run.gate()
    for name in args.rows:
        run.row(name)
    sys.exit(not right)


if __name__ == "__main__":
    main()
