"""Context parallel settings that cannot work are refused before anything starts, with what would work."""

from __future__ import annotations

import pytest

from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training.settings_for_tests import validated

CP4 = "--context-parallel-size 4 --num-layers 4 --num-attention-heads 4 --hidden-size 32"
REFUSED = {
    "--seq-length 36": r"--seq-length \(36\) must be divisible by 8, twice --context-parallel-size; the nearest that "
    "is: 32 or 40",
    "--seq-length 6": "the nearest that is: 8",
    "--seq-length 24 --tensor-model-parallel-size 4 --sequence-parallel": r"\(24\) must be divisible by 16 for "
    ".*-size 4 and --context-parallel-size 4; the nearest that is: 16 or 32",
    "--cp-comm-type ring": "--cp-comm-type 'ring' is unknown; it can be p2p, all_gather, a2a, a2a.p2p",
    "--cp-comm-type p2p a2a": r"--cp-comm-type lists 2 layers, --num-layers \(4\): give one way for all layers or 4",
    "--cp-comm-type a2a --tensor-model-parallel-size 2": r"a2a shares the 2 attention heads of a tensor parallel rank "
    r"among 4 context parallel ranks: 2 must be divisible by 4; with these heads \[1, 2\] would do",
    "--cp-comm-type a2a+p2p": "needs --hierarchical-context-parallel-sizes",
    "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 3": "multiply to 6, but --context-parallel-size "
    "is 4",
    "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 1": r"of two levels .* found \[2, 2, 1\]; "
    r"possible are \[2, 2\]",
    "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 4 1 --tensor-model-parallel-size 2": "2 must be "
    "divisible by 4",
}


@pytest.mark.parametrize("flags", list(REFUSED))
def test_refused(flags: str) -> None:
    with pytest.raises(ConfigurationError, match=REFUSED[flags]):
        validated(f"{CP4} {flags}", world_size=16)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "p2p"),
        ("--cp-comm-type allgather", "allgather"),
        ("--cp-comm-type p2p a2a all_gather p2p", ["p2p", "a2a", "all_gather", "p2p"]),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 --tensor-model-parallel-size 2", "a2a+p2p"),
    ],
)
def test_accepted(flags: str, expected: object) -> None:
    args = validated(f"{CP4} --seq-length 32 {flags}", world_size=16)
    config = core_transformer_config_from_args(args)
    assert (config.context_parallel_size, config.cp_comm_type) == (4, expected)
    assert args.data_parallel_size == 16 // 4 // args.tensor_model_parallel_size


def test_sizes_without_effect_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    validated(f"{CP4} --seq-length 32 --hierarchical-context-parallel-sizes 2 2", world_size=4)
    assert "no effect without --cp-comm-type a2a+p2p" in caplog.text
