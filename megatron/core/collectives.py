"""Collectives whose names differ between the torch versions that are supported."""

from __future__ import annotations

import torch.distributed as dist

# torch 2.13 renames the two; the old names warn there and the new ones do not exist before.
all_gather_into_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
