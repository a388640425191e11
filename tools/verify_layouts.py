"""Verify that a layout computes what one process computes, on a small copy of your own model.

    python tools/verify_layouts.py --nproc 8 -- --num-layers 32 --hidden-size 4096 ... --tensor-model-parallel-size 2

takes the flags of an ordinary training command, shrinks the model (ratios, layout and kinds of layers stay), trains it
for some steps in that layout and on one process in float64, on this machine, and prints how far loss, gradient norm,
every parameter's gradient and the updated weights are apart, and how far they may be. With --bf16 or --fp16 it does so
in float32 first and then in that type, where it may deviate as far as a reordering of sums explains.

The exit code is 0 if all is within bounds, 1 if something is not, 2 if the flags cannot be used or verified.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the library and the program beside this folder

from megatron.training.settings import ConfigurationError
from megatron.training.verify.measure import Measurement, Samples
from megatron.training.verify.verify import RankError, Runner, load_program, on_this_machine, shrink, verify


def announced(run: Runner) -> Runner:
    """`run`, saying on stderr what runs: it may take a minute."""

    def run_and_say(ranks: int, words: list[str], samples: Samples, options: dict[str, Any]) -> Measurement:
        half = [word for word in words if word in ("--bf16", "--fp16")]
        precision = "float64" if options.get("in_float64") else half[0][2:] if half else "float32"
        order = ", sums reordered" if "reordered" in options else ""
        sys.stderr.write(f"running {ranks} rank{'s' * (ranks > 1)} in {precision}{order}\n")
        return run(ranks, words, samples, options)

    return run_and_say


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nproc", type=int, help="ranks; default: the fewest that hold the model once")
    parser.add_argument("--steps", type=int, default=5, help="iterations of both runs (default: 5)")
    parser.add_argument("--program", default=str(ROOT / "pretrain_gpt.py"), help="file with model and forward step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    own, flags = parser.parse_known_args()
    try:
        program = load_program(own.program)
        command = shrink([flag for flag in flags if flag != "--"], own.nproc, own.steps, program.args_defaults)
        print(f"{command.ranks} ranks against one process in float64, on a small copy of the model:")
        for change in command.changes:
            print(f"  {change}")
        verdict = verify(command, announced(on_this_machine(own.program)))
    except ConfigurationError as error:
        sys.stderr.write(f"verify_layouts.py: error: {error}\n")
        return 2
    except RankError as error:
        sys.stderr.write(f"verify_layouts.py: the run failed on {error}\n")
        return 1
    for comparison in verdict.comparisons:
        print(f"{comparison.precision}:", *comparison.lines(), sep="\n")
    print("the layout computes what one process computes" if verdict.holds else "the layout computes something else")
    if own.json:
        own.json.write_text(json.dumps(verdict.as_json(), indent=1) + "\n")
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
