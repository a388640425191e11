"""Activities and ranks in words, for messages and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.activity import activity
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups

ROLES = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "pp": "pipeline",
    "dp": "data parallel",
    "ep": "expert parallel",
    "dp_cp": "data and context parallel",
    "intra_dp_cp": "data and context parallel",
    "mp": "tensor and pipeline parallel",
    "tp_cp": "tensor and context parallel",
    "embd": "tied embedding's",
    "pos_embd": "position embedding's",
    "expt_dp": "expert data parallel",
}
"""What the ranks of a group are called; of two that have the same ranks, the first."""


def in_words(one: activity) -> str:
    """E.g. "all-reduce of gradients over the data parallel ranks 0 and 2", or "receive of activations of microbatch 3
    from rank 1"."""
    of = f" of {one.details['of']}" if one.details.get("of") else ""
    if one.group is None:
        return f"{one.name}{of}"
    ranks = dist.get_process_group_ranks(one.group)
    if one.peer is None:
        return f"{one.name}{of} over {role_of(one.group)} {spoken(ranks)}"
    link = "to" if one.name == "send" else "from"
    return f"{one.name}{of} {link} rank {ranks[one.peer]}, in {role_of(one.group)} {spoken(ranks)}"


def role_of(group: ProcessGroup) -> str:
    """What the ranks of a group are to each other, e.g. "the tensor parallel"."""
    if group is dist.group.WORLD:
        return "all"
    if has_default_process_groups():
        groups = default_process_groups()
        for name, role in ROLES.items():
            if getattr(groups, name) is group:
                return f"the {role}"
    return "the"


def spoken(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0 and 2`, `ranks 0, 1 and 2`, or, of many, `ranks 0, 1, 2, … 63 (64 of them)`."""
    words = [str(rank) for rank in ranks]
    if len(words) == 1:
        return f"rank {words[0]}"
    if len(words) > 8:
        return f"ranks {', '.join(words[:3])}, … {words[-1]} ({len(words)} of them)"
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"
