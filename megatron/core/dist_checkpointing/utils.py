"""Small operations on sharded state dicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from .dict_utils import dict_list_map_inplace, extract_matching_values
from .mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    StateDict,
)

logger = logging.getLogger(__name__)
_logger_names: list[str] = []


def zip_strict(*args: Any) -> zip:
    """`zip` of sequences that must have the same length."""
    return zip(*args, strict=True)


def _extract(state_dict: ShardedStateDict, *classes: type) -> tuple[Any, Any]:
    return extract_matching_values(state_dict, lambda value: isinstance(value, classes), return_lists_as_dicts=True)


def extract_sharded_tensors(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, StateDict]:
    """(sharded tensors, everything else). In these functions lists become dictionaries from index to
    value."""
    return _extract(sharded_state_dict, ShardedTensor)


def extract_sharded_tensors_and_factories(
    sharded_state_dict: ShardedStateDict,
) -> tuple[ShardedStateDict, StateDict]:
    """(sharded tensors and factories, everything else)."""
    return _extract(sharded_state_dict, ShardedTensor, ShardedTensorFactory)


def extract_sharded_tensors_or_nonpersistent(
    sharded_state_dict: ShardedStateDict,
) -> tuple[ShardedStateDict, StateDict]:
    """(sharded tensors, factories and non-persistent objects; everything else)."""
    return _extract(sharded_state_dict, ShardedTensor, ShardedTensorFactory, LocalNonpersistentObject)


def extract_sharded_base(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, StateDict]:
    """(everything sharded, everything else)."""
    return _extract(sharded_state_dict, ShardedBase)


def extract_nonpersistent(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, StateDict]:
    """(non-persistent objects, everything else)."""
    return _extract(sharded_state_dict, LocalNonpersistentObject)


def _rename(sharded_state_dict: ShardedStateDict, new_key: Callable[[str], str]) -> None:
    def rename(value: Any) -> Any:
        if isinstance(value, (ShardedTensor, ShardedTensorFactory, ShardedObject)):
            value.key = new_key(value.key)
        return value

    dict_list_map_inplace(rename, sharded_state_dict)


def add_prefix_for_sharding(sharded_state_dict: ShardedStateDict, prefix: str) -> None:
    """Put `prefix` before the names of all sharded values, in place. The keys of the dictionary stay."""
    _rename(sharded_state_dict, lambda key: prefix + key)


def replace_prefix_for_sharding(sharded_state_dict: ShardedStateDict, old_prefix: str, new_prefix: str) -> None:
    """Exchange the prefix of the names of all sharded values, in place; every name must have it."""

    def new_key(key: str) -> str:
        if not key.startswith(old_prefix):
            raise ValueError(f"expected {key!r} to start with {old_prefix!r}")
        return new_prefix + key[len(old_prefix) :]

    _rename(sharded_state_dict, new_key)


def apply_prefix_mapping(sharded_state_dict: ShardedStateDict, prefix_map: dict[str, str]) -> None:
    """Exchange the first prefix of `prefix_map` that a name has, in place; other names stay."""

    def new_key(key: str) -> str:
        for old, new in prefix_map.items():
            if key.startswith(old):
                return new + key[len(old) :]
        return key

    _rename(sharded_state_dict, new_key)


@contextmanager
def logger_stack(
    name: str | None = None, current_logger: logging.Logger | None = None
) -> Iterator[tuple[str, logging.Logger]]:
    """(dotted name, logger) of the code that runs inside; nested uses extend the name."""
    if name is not None:
        _logger_names.append(name)
    try:
        yield ".".join(_logger_names), current_logger or logger
    finally:
        if name is not None:
            _logger_names.pop()


@contextmanager
def debug_time(
    name: str,
    logger: logging.Logger | None = None,
    threshold: float = float("-inf"),
    level: int | None = None,
) -> Iterator[None]:
    """Log how long the code inside took, if it took longer than `threshold` seconds."""
    with logger_stack(name, logger) as (stack, chosen):
        start = perf_counter()
        try:
            yield
        finally:
            seconds = perf_counter() - start
            if seconds > threshold:
                chosen.log(logging.DEBUG if level is None else level, "%s took %.3f s", stack, seconds)


def debug_msg(msg: str) -> None:
    """Log a message under the names of the code that is running."""
    with logger_stack() as (stack, chosen):
        chosen.debug("%s %s", stack, msg)
