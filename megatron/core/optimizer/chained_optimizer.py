"""Several optimizers stepped as one: dense weights and experts have different replicas, hence shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer.clip_grads import reduce_over
from megatron.core.optimizer.megatron_optimizer import MegatronOptimizer, gather_weights_of


class ProxyDict(MutableMapping[tuple[int, Any], Any]):
    """Several dictionaries as one, whose keys are (number of the dictionary, key in it)."""

    def __init__(self, inner_dicts: list[Any]) -> None:
        self._inner_dicts = inner_dicts

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        return self._inner_dicts[key[0]][key[1]]

    def __setitem__(self, key: tuple[int, Any], value: Any) -> None:
        self._inner_dicts[key[0]][key[1]] = value

    def __delitem__(self, key: tuple[int, Any]) -> None:
        del self._inner_dicts[key[0]][key[1]]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((i, key) for i, inner in enumerate(self._inner_dicts) for key in inner)

    def __len__(self) -> int:
        return sum(map(len, self._inner_dicts))


class ChainedOptimizer(MegatronOptimizer):
    """Steps all of its optimizers or none, clips by their common norm and keeps their loss scales equal."""

    def __init__(self, chained_optimizers: list[MegatronOptimizer]) -> None:
        if not chained_optimizers:
            raise ValueError("a chain needs at least one optimizer")
        self.chained_optimizers = chained_optimizers
        self.config = chained_optimizers[0].config

    @property
    def optimizer(self) -> torch.optim.Optimizer:  # type: ignore[override]
        """The inner optimizer, of a chain of one."""
        if len(self.chained_optimizers) > 1:
            raise AttributeError(f"a chain of {len(self.chained_optimizers)} has no single inner optimizer")
        return self.chained_optimizers[0].optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.chained_optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> ProxyDict:
        return ProxyDict([optimizer.state for optimizer in self.chained_optimizers])

    def get_loss_scale(self) -> Tensor:
        return self.chained_optimizers[0].get_loss_scale()

    def grads_states_parallel_group_is_shared(self) -> bool:
        """Whether all optimizers sum their statistics over the same ranks."""
        first, *others = (optimizer.get_grad_stats_parallel_group() for optimizer in self.chained_optimizers)
        return all(other is first for other in others)

    def get_grad_stats_parallel_group(self) -> ProcessGroup | None:
        """The ranks of all statistics, if they are the same."""
        if not self.grads_states_parallel_group_is_shared():
            raise ValueError("the chained optimizers sum their gradient statistics over different groups")
        return self.chained_optimizers[0].get_grad_stats_parallel_group()

    def get_grad_norm(self) -> float:
        """L2 norm over all optimizers; one collective if they share the group."""
        squares = [optimizer.sum_of_squares() for optimizer in self.chained_optimizers]
        if self.grads_states_parallel_group_is_shared():
            squares = [torch.stack(squares).sum()]
        for square, optimizer in zip(squares, self.chained_optimizers):
            reduce_over(square, optimizer.get_grad_stats_parallel_group(), dist.ReduceOp.SUM)
        return float(torch.stack(squares).sum().sqrt())

    def clip_grad_norm(self, clip_grad: float) -> float:
        grad_norm = self.get_grad_norm()
        for optimizer in self.chained_optimizers:
            optimizer.clip_grads(clip_grad, grad_norm)
        return grad_norm

    def count_zeros(self) -> float:
        return sum(optimizer.count_zeros() for optimizer in self.chained_optimizers)

    def collect_grads(self) -> bool:
        # all of them, whatever the first one found: each takes part in collectives
        overflows = [optimizer.collect_grads() for optimizer in self.chained_optimizers]
        return any(overflows)

    def prepare_grads(self) -> bool:
        """As one optimizer: every loss scale sees an overflow that any of them found."""
        found_inf = torch.tensor(float(self.collect_grads()), device=device.current_device())
        for optimizer in self.chained_optimizers:
            reduce_over(found_inf, optimizer.get_grad_stats_parallel_group(), dist.ReduceOp.MAX)
        overflowed = bool(found_inf)
        for optimizer in self.chained_optimizers:
            scaler = getattr(optimizer, "grad_scaler", None)
            if scaler is not None:
                scaler.update(overflowed)
        return overflowed

    def step_with_ready_grads(self) -> bool:
        """Weights are gathered once every optimizer has updated its own: several may update parts of one chunk.

        With `overlap_param_gather_with_optimizer_step` a chunk's first bucket is launched as soon as the last
        optimizer that updates it is done, while others still update other chunks.
        """
        if not self.config.overlap_param_gather_with_optimizer_step:
            self.update_weights()
            gather_weights_of(dict.fromkeys(self.sharded_chunks), self.config)
            return True
        updates_left = Counter(self.sharded_chunks)
        for optimizer in self.chained_optimizers:
            optimizer.update_weights()
            updates_left.subtract(optimizer.sharded_chunks)
            for chunk in optimizer.sharded_chunks:
                if not updates_left[chunk]:
                    chunk.weights_changed(launch=True)
        return True

    def update_weights(self) -> None:
        for optimizer in self.chained_optimizers:
            optimizer.update_weights()

    @property
    def sharded_chunks(self) -> list[Any]:
        """One entry for each optimizer that updates a chunk."""
        return [chunk for optimizer in self.chained_optimizers for chunk in optimizer.sharded_chunks]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.chained_optimizers:
            optimizer.zero_grad(set_to_none)

    def get_parameters(self) -> list[Tensor]:
        return [param for optimizer in self.chained_optimizers for param in optimizer.get_parameters()]

    def reload_model_params(self) -> None:
        for optimizer in self.chained_optimizers:
            optimizer.reload_model_params()

    def state_dict(self) -> Any:
        """The dictionary of the only optimizer, or a list of dictionaries."""
        state_dicts = [optimizer.state_dict() for optimizer in self.chained_optimizers]
        return state_dicts[0] if len(state_dicts) == 1 else state_dicts

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ShardedStateDict:
        """The one of the only optimizer, or {number: state} with shards named `chained_<number>.<key>`."""
        sharded = {
            i: optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, metadata=metadata, **kwargs)
            for i, optimizer in enumerate(self.chained_optimizers)
        }
        if len(sharded) == 1:
            return sharded[0]
        _count_steps_alike(list(sharded.values()))
        for i, state_dict in sharded.items():
            add_prefix_for_sharding(state_dict, f"chained_{i}.")
        return sharded  # type: ignore[return-value]

    def load_state_dict(self, state_dict: Any) -> None:
        for optimizer, own in zip(self.chained_optimizers, self._one_per_optimizer(state_dict)):
            optimizer.load_state_dict(own)

    def save_parameter_state(self, filename: str | Path) -> None:
        """Write the sharded state of all distributed optimizers into one file; None for the others."""
        if len(self.chained_optimizers) == 1:
            self.chained_optimizers[0].save_parameter_state(filename)  # type: ignore[attr-defined]
            return
        states = [
            optimizer.get_parameter_state_dp_zero() if hasattr(optimizer, "get_parameter_state_dp_zero") else None
            for optimizer in self.chained_optimizers
        ]
        if any(state is not None for state in states):
            torch.save(states, filename)

    def load_parameter_state(self, filename: str | Path, *, update_legacy_format: bool = False) -> None:
        """Restore what `save_parameter_state` wrote."""
        if len(self.chained_optimizers) == 1:
            self.chained_optimizers[0].load_parameter_state(  # type: ignore[attr-defined]
                filename, update_legacy_format=update_legacy_format
            )
            return
        states: Any = [None] * len(self.chained_optimizers)
        if Path(filename).exists():
            states = safe_torch_load(filename)
        for optimizer, state in zip(self.chained_optimizers, self._one_per_optimizer(states)):
            if hasattr(optimizer, "load_parameter_state_from_dp_zero"):
                optimizer.load_parameter_state_from_dp_zero(state, update_legacy_format=update_legacy_format)

    def _one_per_optimizer(self, states: Any) -> list[Any]:
        count = len(self.chained_optimizers)
        if isinstance(states, dict):
            states = [states[i] for i in sorted(states)] if count > 1 else [states]
        if len(states) != count:
            raise ValueError(f"the checkpoint holds the state of {len(states)} optimizers, this run has {count}")
        return list(states)


def _count_steps_alike(sharded: list[Any]) -> None:
    """Give the step counter of the others to an optimizer that has no weights on this rank: one rank writes what all
    will read."""
    inner = [state.get("optimizer", state) for state in sharded]
    inner = [state for state in inner if isinstance(state, dict)]  # an object of this layout alone is for this rank
    groups = [group for state in inner for group in state["param_groups"]]
    states = [state["state"] for state in inner if "state" in state]
    for name, holders in (("step", groups), ("common_step", states)):
        counters = [holder[name] for holder in holders if name in holder]
        for holder in holders if counters else ():
            holder.setdefault(name, counters[0].clone())
