"""Refusals of the rules about checkpoints."""

from __future__ import annotations

from megatron.training.rules import checkpoint
from tests.unit_tests.training.refusals.refusal import Refusal

REFUSALS = [
    Refusal(checkpoint.require_save_interval, "--save x needs --save-interval", "--save x"),
    Refusal(
        checkpoint.require_dist_format_without_gloo,
        "needs --ckpt-format torch_dist",
        "--use-distributed-optimizer --disable-gloo-process-groups --ckpt-format torch",
    ),
    Refusal(checkpoint.require_expressible, "has no effect without --save-hf", "--hf-model-type llama"),
    Refusal(checkpoint.require_conversion_paths, "needs --load", values={"ckpt_convert_format": "torch"}),
    Refusal(
        checkpoint.require_place_of_local_checkpoints,
        "needs --non-persistent-local-ckpt-dir",
        values={"non_persistent_ckpt_type": "local"},
    ),
    Refusal(checkpoint.require_fsdp_for_torch_dcp, "needs --use-torch-fsdp2", values={"ckpt_format": "torch_dcp"}),
    Refusal(
        checkpoint.require_dist_format_for_async_save,
        "needs --ckpt-format torch_dist",
        values={"async_save": True, "ckpt_format": "torch"},
    ),
    Refusal(checkpoint.require_known_retention, "at least one", values={"save_keep_last": 0}),
    Refusal(
        checkpoint.require_known_retention, "must be a multiple", values={"save_interval": 3, "save_retain_interval": 4}
    ),
    Refusal(
        checkpoint.require_non_persistent_place,
        "needs --non-persistent-ckpt-type and --save",
        values={"non_persistent_save_interval": 4},
    ),
    Refusal(checkpoint.require_replication_fits, "needs --replication-jump", values={"replication": True}),
    Refusal(
        checkpoint.require_replication_fits,
        "needs --non-persistent-ckpt-type local",
        values={"replication": True, "replication_jump": 2},
    ),
    Refusal(
        checkpoint.require_replication_fits,
        "must divide the 8 ranks",
        values={"replication": True, "replication_jump": 3, "non_persistent_ckpt_type": "local", "world_size": 8},
    ),
    Refusal(checkpoint.prepare_upcycling, "needs --save", values={"moe_use_upcycling": True}),
    Refusal(checkpoint.prepare_upcycling, "needs --load", values={"moe_use_upcycling": True, "save": "x"}),
]
