"""Refusals of the rules about what the library's configurations refuse themselves."""

from __future__ import annotations

from megatron.training.rules import objects
from tests.unit_tests.training.refusals.refusal import Refusal

REFUSALS = [
    Refusal(
        objects.require_valid_library_configs,
        "--pipeline-model-parallel-layout .* has 3 transformer layers",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tL",
        world_size=2,
    ),
    Refusal(
        objects.require_valid_library_configs,
        r"--ffn-hidden-size \(130\) must be divisible by --tensor-model-parallel-size \(4\)",
        "--tensor-model-parallel-size 4 --ffn-hidden-size 130",
        world_size=4,
    ),
    Refusal(
        objects.require_valid_library_configs,
        "--decoder-first-pipeline-num-layers",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4",
        world_size=2,
    ),
    Refusal(
        objects.require_valid_library_configs,
        r"--num-layers \(4\) and --decoder-first-pipeline-num-layers \(1\)",
        "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 1",
        world_size=3,
    ),
]
