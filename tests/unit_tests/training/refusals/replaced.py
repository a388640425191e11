"""Refusals of the rules about flags that others replaced."""

from __future__ import annotations

from megatron.training.rules import replaced
from tests.unit_tests.training.refusals.refusal import Refusal

REFUSALS = [
    Refusal(replaced.refuse_replaced_flags, "use --micro-batch-size 3", "--batch-size 3"),
    Refusal(replaced.refuse_replaced_flags, "use --lr-warmup-fraction", "--warmup 3"),
    Refusal(replaced.refuse_replaced_flags, "use --tensor-model-parallel-size 2", "--model-parallel-size 2"),
    Refusal(replaced.refuse_checkpoint_activations, "use --recompute-activations", "--checkpoint-activations"),
]
