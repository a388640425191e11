"""Refusals of the rules about the parallel layout."""

from __future__ import annotations

from megatron.training.rules import layout
from tests.unit_tests.training.refusals.refusal import Refusal

REFUSALS = [
    Refusal(
        layout.require_world_fits_layout,
        r"1 processes \(WORLD_SIZE\) do not divide by --tensor-model-parallel-size 2 = 2",
        "--tensor-model-parallel-size 2",
    ),
    Refusal(layout.require_world_fits_layout, "must be at least 1", "--pipeline-model-parallel-size 0"),
    Refusal(
        layout.require_world_fits_layout,
        "start a multiple of 2 processes",
        "--tensor-model-parallel-size 2",
        world_size=3,
    ),
    Refusal(
        layout.require_context_groups_fit,
        "multiply to 4, but --context-parallel-size is 2",
        values={"hierarchical_context_parallel_sizes": [2, 2], "context_parallel_size": 2},
    ),
    Refusal(layout.require_context_groups_fit, "needs --hierarchical", values={"cp_comm_type": ["a2a+p2p"]}),
    Refusal(
        layout.require_saved_vocabulary_fits_ranks,
        r"the checkpoint's padded vocabulary \(101\) must be divisible",
        values={"padded_vocab_size": 101, "tensor_model_parallel_size": 2},
    ),
    Refusal(
        layout.require_sequence_parallel_for_overlap, "needs --sequence-parallel", values={"tp_comm_overlap": True}
    ),
]
