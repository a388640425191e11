"""When a model chunk's collectives are launched and waited for.

Backward produces gradients from the last layer to the first, forward uses weights from the first to the last. A
bucket's gradients are reduced while backward is still busy with the layers before it, and its weights are gathered
while forward is busy with the layers before it.

Both go through the buckets in one fixed order, whatever a rank's backward or forward does: collectives that ranks
launch in different orders would exchange the wrong data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from megatron.core.distributed.bucket_group import Weights, _ParamAndGradBucketGroup
from megatron.core.tensor_parallel.weight_grad_queue import num_postponed_grads

BucketGroups = Sequence[_ParamAndGradBucketGroup]


def in_forward_order(bucket_groups: BucketGroups, params: Sequence[Parameter]) -> list[_ParamAndGradBucketGroup]:
    """Groups by the first of their parameters that forward needs; `params` are in the order of the forward pass."""
    position = {param: i for i, param in enumerate(params)}

    def first_use(group: _ParamAndGradBucketGroup) -> int:
        return min(position[param] for bucket in group.buckets for param in bucket.params)

    return sorted(bucket_groups, key=first_use)


class GradReducer:
    """Reduces the gradients of a model chunk over its replicas.

    Overlapped, `gradient_added` launches a bucket as soon as all of its gradients of the last microbatch are
    there and the buckets before it are launched; `finish` launches what is left and waits. Otherwise all are
    launched at the end.

    A parameter that is used in several places may receive its gradient in several parts (each piece of a model
    that is recomputed runs a backward of its own). How many is learned in the first step, which therefore
    launches nothing early.

    Args:
        bucket_groups: in the order in which their gradients become complete.
        names: of the parameters, for messages.
        overlap: launch early.
    """

    def __init__(self, bucket_groups: BucketGroups, names: Mapping[Parameter, str], *, overlap: bool) -> None:
        self.bucket_groups = list(bucket_groups)
        self.names = names
        self.overlap = overlap
        self._group_of = {
            param: group for group in self.bucket_groups for bucket in group.buckets for param in bucket.params
        }
        self._parts_expected: dict[Parameter, int] = {}
        """Learned; empty before the first step."""
        self._nodes: list[Any] = []
        if overlap:
            for param in self._group_of:
                self._watch(param)
        self.is_last_microbatch = True
        """Whether the backward that runs is the last one before `finish`."""
        self._begin_step()

    def _watch(self, param: Parameter) -> None:
        # The node calls also where a kernel has added to main_grad itself and hands autograd nothing. It is
        # kept alive because autograd would make another one, without the hook.
        node = torch.autograd.graph.get_gradient_edge(param).node
        node.register_hook(lambda *unused: self.gradient_added(param))
        self._nodes.append(node)

    def _begin_step(self) -> None:
        self._parts: dict[Parameter, int] = dict.fromkeys(self._group_of, 0)
        self._incomplete = {group: sum(len(bucket.params) for bucket in group.buckets) for group in self.bucket_groups}
        self._launched = 0

    def gradient_added(self, param: Parameter) -> None:
        """Note that a part of the gradient has been added to `main_grad`; launches what has become complete.

        Where backward is split, all products that make up a weight's gradient are one part, added by the last.

        Raises:
            RuntimeError: the gradient is being reduced already, and would miss this part.
        """
        if not (self.overlap and self.is_last_microbatch) or num_postponed_grads(param):
            return
        group = self._group_of[param]
        self._parts[param] += 1
        if group.is_grad_sync_started:
            raise RuntimeError(
                f"{self.names[param]} received part {self._parts[param]} of its gradient after its bucket was sent off "
                f"to be reduced: it used to receive {self._parts_expected.get(param, 1)}. Without "
                "--overlap-grad-reduce the number may change from step to step"
            )
        if self._parts[param] == self._parts_expected.get(param, 1):
            self._incomplete[group] -= 1
        if self._parts_expected:
            while self._launched < len(self.bucket_groups) and not self._incomplete[self._next()]:
                self._launch_next()
            self._advance()

    def _next(self) -> _ParamAndGradBucketGroup:
        return self.bucket_groups[self._launched]

    def _launch_next(self) -> None:
        self._next().start_grad_sync()
        self._launched += 1

    def _advance(self) -> None:
        """In order, too: what follows inside an instance goes over the group that all buckets share."""
        for group in self.bucket_groups[: self._launched]:
            if not group.advance_grad_sync():
                return

    def start(self) -> None:
        """Launch the reduction of every bucket that has not been."""
        while self._launched < len(self.bucket_groups):
            self._launch_next()

    def finish(self) -> None:
        """Wait until the gradients are reduced, launching what has not been; all buckets are in flight together."""
        self.start()
        for group in self.bucket_groups:
            group.finish_grad_sync()
        for param, parts in self._parts.items():
            self._parts_expected[param] = max(1, parts, self._parts_expected.get(param, 1))
        self._begin_step()


class WeightGatherer:
    """Gathers the weights of a model chunk from the ranks that have updated them.

    Args:
        bucket_groups: in the order in which forward needs them.
    """

    def __init__(self, bucket_groups: BucketGroups) -> None:
        self.bucket_groups = list(bucket_groups)
        self._not_whole = 0
        """Groups whose weights are stale or in flight: hooks return at once while there are none."""
        self._launched = len(self.bucket_groups)
        self._hooks: list[RemovableHandle] = []

    def weights_changed(self) -> None:
        """The optimizer has updated each rank's own part."""
        self.settle()
        for group in self.bucket_groups:
            group.weights = Weights.STALE
        self._not_whole, self._launched = len(self.bucket_groups), 0

    def start_next(self) -> None:
        """Launch the gathering of the next bucket in order."""
        if self._launched < len(self.bucket_groups):
            self.bucket_groups[self._launched].start_param_sync()
            self._launched += 1

    def start(self) -> None:
        """Launch the gathering of all stale weights."""
        while self._launched < len(self.bucket_groups):
            self.start_next()

    def settle(self) -> None:
        """Wait for what is in flight, so that the bucket may be written; launches nothing."""
        for group in self.bucket_groups[: self._launched]:
            if group.weights is Weights.IN_FLIGHT:
                self._wait_for(group)

    def finish(self) -> None:
        """Afterwards every rank has all weights."""
        self.start()
        self.settle()

    def _wait_for(self, group: _ParamAndGradBucketGroup) -> None:
        group.finish_param_sync()
        self._not_whole -= 1

    def require(self, groups: BucketGroups) -> None:
        """Wait until the weights of `groups` are whole, then launch the next bucket behind them."""
        for group in groups:
            while group.weights is Weights.STALE:
                self.start_next()
            if group.weights is Weights.IN_FLIGHT:
                self._wait_for(group)
                if self._launched == self.bucket_groups.index(group) + 1:
                    self.start_next()

    # --- hooks ---

    def attach(self, module: nn.Module) -> None:
        """Before any submodule that has weights of its own runs, they are whole. Does nothing while attached."""
        if self._hooks:
            return
        group_of = {param: group for group in self.bucket_groups for bucket in group.buckets for param in bucket.params}
        for submodule in module.modules():
            own = [group_of[param] for param in submodule.parameters(recurse=False) if param in group_of]
            if own:
                groups = sorted(set(own), key=self.bucket_groups.index)
                self._hooks.append(submodule.register_forward_pre_hook(self._hook(groups), prepend=True))

    def _hook(self, groups: list[_ParamAndGradBucketGroup]) -> Any:
        def require_weights(*unused: Any) -> None:
            if self._not_whole:
                self.require(groups)

        return require_weights

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
