"""What a task says when it is done."""

from __future__ import annotations

from megatron.training.global_vars import get_trackers
from megatron.training.utils import print_rank_last


def report_results(task: str, results: dict[str, float], iteration: int = 0) -> None:
    """Print the results on the last rank, and give them to the trackers at full precision."""
    words = "".join(f"{name}: {_shown(name, value)} | " for name, value in results.items())
    line = f" validation results on {task} | {words}"
    rule = "-" * (len(line) + 1)
    print_rank_last(f"{rule}\n{line}\n{rule}")
    trackers = get_trackers()
    if trackers is not None:
        trackers.log({f"{task} {name}": value for name, value in results.items()}, iteration, 0)
        trackers.record({"task": task, "iteration": iteration} | results)


def _shown(name: str, value: float) -> str:
    return str(value) if name == "token ratio" else f"{value:.4E}"
