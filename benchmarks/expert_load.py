"""Train as a program of this repository does, and note how many tokens each expert gets.

    torchrun --nproc-per-node 2 benchmarks/expert_load.py LOAD_FOLDER pretrain_gpt.py FLAGS

Each rank writes LOAD_FOLDER/rank-N.json, {"training" or "validation": {layer: [tokens of each expert, a list for each
micro-batch of this rank]}}. `entropies` reads them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from megatron.core.transformer.moe.router import TopKRouter


def entropies(folder: Path, phase: str, *, first: int | None = None, last: int | None = None) -> dict[str, float]:
    """Layer -> entropy of the load over ln(experts): 1 when all experts get equally many tokens.

    Args:
        phase: "training" or "validation".
        first: count the first so many micro-batches of each rank only.
        last: count the last so many.
    """
    counts: dict[str, Tensor] = {}
    for path in sorted(folder.glob("rank-*.json")):
        for layer, batches in json.loads(path.read_text())[phase].items():
            of_rank = torch.tensor(batches[:first] if first else batches[-(last or 0) :]).sum(0)
            counts[layer] = counts.get(layer, torch.zeros_like(of_rank)) + of_rank
    found = {}
    for layer, count in counts.items():
        share = count.double() / count.sum()
        found[layer] = float(torch.special.entr(share).sum() / torch.tensor(float(len(share))).log())
    return found


def main(folder: Path, program: str, flags: list[str]) -> None:
    """Run the program with a hook on every router."""
    loads: dict[str, dict[int, list[list[int]]]] = {"training": defaultdict(list), "validation": defaultdict(list)}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, TopKRouter) and module.layer_number is not None:
            phase = "training" if module.training else "validation"
            loads[phase][module.layer_number].append(output[1].sum(0).tolist())

    nn.modules.module.register_module_forward_hook(note)
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(loads))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
