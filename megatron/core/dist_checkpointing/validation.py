"""Checks before anything is written or read: do the shards of all ranks tile the global state, do the names
match?"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

from .collective import gather_from_all
from .core import CheckpointingException, maybe_load_config
from .dict_utils import extract_matching_values, nested_values
from .mapping import (
    CommonStateDict,
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    is_main_replica,
)
from .strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
    LoadStrategyBase,
    SaveCommonStrategy,
    SaveShardedStrategy,
    StrategyAction,
    get_default_strategy,
)

logger = logging.getLogger(__name__)

EXTRA_STATE = "._extra_state/shard_"
"""Part of the names of what other programs store with a layer; never missed."""

LocalMetadata = list[ShardedBase]
GlobalMetadata = list[LocalMetadata]
CkptShardedMetadata = dict[str, Any]


class StrictHandling(Enum):
    """What to do when the requested state and the checkpoint have different names.

    "unexpected" are names that are requested and not in the checkpoint, "missing" those that are in the
    checkpoint and requested by no rank. LOG and RETURN load what there is; ASSUME_OK_UNEXPECTED makes no
    check of its own, so that the reader fails on unexpected names.
    """

    ASSUME_OK_UNEXPECTED = "assume_ok_unexpected"
    LOG_UNEXPECTED = "log_unexpected"
    LOG_ALL = "log_all"
    RAISE_UNEXPECTED = "raise_unexpected"
    RAISE_ALL = "raise_all"
    RETURN_UNEXPECTED = "return_unexpected"
    RETURN_ALL = "return_all"
    IGNORE_ALL = "ignore_all"

    @staticmethod
    def requires_explicit_ckpt_mismatch_check(val: StrictHandling) -> bool:
        """Whether the names in the checkpoint must be compared with the requested ones."""
        return val is not StrictHandling.ASSUME_OK_UNEXPECTED

    @staticmethod
    def requires_global_app_metadata(val: StrictHandling) -> bool:
        """Whether the names requested by all ranks are needed."""
        return val in (StrictHandling.LOG_ALL, StrictHandling.RAISE_ALL, StrictHandling.RETURN_ALL)

    @staticmethod
    def requires_returning_mismatch_keys(val: StrictHandling) -> bool:
        """Whether `load` returns the names that do not match."""
        return val in (StrictHandling.RETURN_UNEXPECTED, StrictHandling.RETURN_ALL)


def parse_strict_flag(strict: str | StrictHandling) -> StrictHandling:
    """The mode of that name."""
    if isinstance(strict, StrictHandling):
        return strict
    try:
        return StrictHandling(strict)
    except ValueError:
        raise ValueError(f"strictness {strict!r} is none of {[mode.value for mode in StrictHandling]}") from None


# ---- names ----


def unique_key(value: ShardedBase) -> str:
    """Name of a sharded value's entry in a checkpoint."""
    return value.unique_key if isinstance(value, ShardedObject) else value.key


def determine_global_metadata(sharded_state_dict: ShardedStateDict) -> tuple[LocalMetadata, GlobalMetadata]:
    """Descriptions of the sharded values of this rank, and of those of every rank."""
    local = [value.without_data() for value in nested_values(sharded_state_dict) if isinstance(value, ShardedBase)]
    return local, gather_from_all(local)


def validate_integrity_and_strict_load(
    sharded_state_dict: ShardedStateDict,
    strict: StrictHandling,
    validate_access_integrity: bool,
    local_metadata: LocalMetadata | None = None,
    global_metadata: GlobalMetadata | None = None,
    ckpt_sharded_metadata: CkptShardedMetadata | None = None,
) -> tuple[ShardedStateDict, set[str], set[str]]:
    """(what can be loaded of the state dict, missing names, unexpected names). All ranks call this.

    Args:
        sharded_state_dict: what is requested.
        strict: what happens to names that do not match.
        validate_access_integrity: check that the ranks together request each tensor exactly once.
        local_metadata, global_metadata: result of `determine_global_metadata`.
        ckpt_sharded_metadata: names in the checkpoint; needed for modes with an explicit check.
    """
    missing: set[str] = set()
    unexpected: set[str] = set()
    if StrictHandling.requires_explicit_ckpt_mismatch_check(strict):
        if ckpt_sharded_metadata is None or global_metadata is None:
            raise CheckpointingException(f"strictness {strict.value} needs the metadata of the checkpoint")
        requested = {unique_key(value) for part in global_metadata for value in part}
        unexpected = requested - set(ckpt_sharded_metadata)
        if StrictHandling.requires_global_app_metadata(strict):
            missing = {key for key in set(ckpt_sharded_metadata) - requested if EXTRA_STATE not in key}
        sharded_state_dict = adjust_non_strict_load(sharded_state_dict, unexpected)
        if strict in (StrictHandling.RAISE_ALL, StrictHandling.RAISE_UNEXPECTED):
            maybe_report_missing_and_unexpected_keys(missing, unexpected, raise_error=True)
        elif strict in (StrictHandling.LOG_ALL, StrictHandling.LOG_UNEXPECTED):
            maybe_report_missing_and_unexpected_keys(missing, unexpected, raise_error=False)
    if validate_access_integrity:
        assert global_metadata is not None
        checked = [[v for v in part if unique_key(v) not in unexpected] for part in global_metadata]
        validate_sharding_integrity(checked)
    return sharded_state_dict, missing, unexpected


def adjust_non_strict_load(sharded_state_dict: ShardedStateDict, sharded_keys_to_remove: set[str]) -> ShardedStateDict:
    """The state dict without the sharded values of those names."""
    if not sharded_keys_to_remove:
        return sharded_state_dict
    _, kept = extract_matching_values(
        sharded_state_dict,
        lambda v: isinstance(v, ShardedBase) and unique_key(v) in sharded_keys_to_remove,
        return_lists_as_dicts=True,
    )
    assert isinstance(kept, dict)
    return kept


def maybe_report_missing_and_unexpected_keys(
    missing_keys: set[str], unexpected_keys: set[str], raise_error: bool = True
) -> None:
    """Raise or log, if there are any, the names that do not match."""
    lines = []
    if unexpected_keys:
        lines.append(f"requested, but not in the checkpoint: {', '.join(sorted(unexpected_keys))}")
    if missing_keys:
        lines.append(f"in the checkpoint, but not requested: {', '.join(sorted(missing_keys))}")
    if lines and raise_error:
        raise CheckpointingException("the state does not fit the checkpoint:\n  " + "\n  ".join(lines))
    for line in lines:
        logger.warning(line)


# ---- tiling ----


def validate_sharding_integrity(
    global_metadata: GlobalMetadata, common_state_dict: CommonStateDict | None = None
) -> None:
    """Raise `CheckpointingException` unless the main replicas of all ranks cover each tensor and object
    exactly once.

    `common_state_dict`, if given, is compared with the other ranks' one; differences are logged.
    """
    if common_state_dict is not None:
        validate_common_state_dict(common_state_dict)
    tensors: dict[str, list[ShardedTensor]] = defaultdict(list)
    objects: dict[str, list[ShardedObject]] = defaultdict(list)
    for value in (value for part in global_metadata for value in part):
        if isinstance(value, ShardedTensor):
            tensors[value.key].append(value)
        elif isinstance(value, ShardedObject):
            objects[value.key].append(value)
    problems = [problem for key, shards in tensors.items() for problem in tensor_problems(key, shards)]
    problems += [problem for key, cells in objects.items() for problem in object_problems(key, cells)]
    if problems:
        raise CheckpointingException("the shards do not make up the global state:\n  " + "\n  ".join(problems))


def validate_common_state_dict(common_state_dict: CommonStateDict) -> None:
    """Log which ranks have another common state than the first one, whose state is the one that is saved."""
    texts = gather_from_all({path: repr(value) for path, value in _leaves(common_state_dict)})
    for rank, text in enumerate(texts[1:], 1):
        differing = sorted(path for path in {*text, *texts[0]} if text.get(path) != texts[0].get(path))
        if differing:
            logger.warning(
                "common state of rank %d differs from what rank 0 saves: %s", rank, ", ".join(differing[:10])
            )


def _leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def tensor_problems(key: str, shards: list[ShardedTensor]) -> list[str]:
    """What is wrong with the shards that all ranks have of one tensor."""
    for name in ("dtype", "global_shape", "axis_fragmentations"):
        values = {str(getattr(shard, name)) for shard in shards}
        if len(values) > 1:
            return [f"{key}: ranks disagree on its {name}: {', '.join(sorted(values))}"]
    boxes: dict[tuple, list[ShardedTensor]] = defaultdict(list)
    for shard in shards:
        if is_main_replica(shard.replica_id):
            boxes[tuple(shard.global_offset), shard.shape_in_global].append(shard)
    problems = [p for (offset, _), at in boxes.items() for p in _box_problems(key, offset, at)]
    volume = sum(prod(sizes) for _, sizes in boxes)
    if volume != prod(shards[0].global_shape):
        verb = "cover" if volume < prod(shards[0].global_shape) else "overlap: they have"
        problems.append(f"{key}: shards {verb} {volume} of {prod(shards[0].global_shape)} elements")
    elif shards[0].axis_fragmentations is None and _any_overlap(list(boxes)):
        problems.append(f"{key}: shards overlap")
    return problems


def _box_problems(key: str, offset: tuple[int, ...], shards: list[ShardedTensor]) -> list[str]:
    """Each box has one main replica, or ranges that tile it."""
    if all(shard.flattened_range is None for shard in shards):
        count = len(shards)
        return [] if count == 1 else [f"{key}: {count} main replicas of the shard at {offset}, expected 1"]
    if any(shard.flattened_range is None for shard in shards):
        return [f"{key}: the shard at {offset} is flattened on some ranks only"]
    ranges = sorted((s.flattened_range.start, s.flattened_range.stop) for s in shards if s.flattened_range is not None)
    position = 0
    for start, stop in ranges:
        if start == stop:
            continue
        if start != position:
            what = "missing" if start > position else "duplicate"
            low, high = sorted((start, position))
            return [f"{key}: elements {low} to {high} of shard {offset} are {what}"]
        position = stop
    total = prod(shards[0].local_shape)
    return [] if position == total else [f"{key}: elements {position} to {total} of shard {offset} are missing"]


def _any_overlap(boxes: list[tuple]) -> bool:
    """Whether two boxes share an element; boxes are sorted so that only neighbours on the first axis are
    compared."""
    boxes = sorted(boxes)
    for i, (offset, sizes) in enumerate(boxes):
        for other_offset, other_sizes in boxes[i + 1 :]:
            if offset and other_offset[0] >= offset[0] + sizes[0]:
                break
            pairs = zip(offset, sizes, other_offset, other_sizes)
            if all(a < c + d and c < a + b for a, b, c, d in pairs):
                return True
    return False


def object_problems(key: str, cells: list[ShardedObject]) -> list[str]:
    """What is wrong with the cells that all ranks have of one grid of objects."""
    grids = {tuple(cell.global_shape) for cell in cells}
    if len(grids) > 1:
        return [f"{key}: ranks disagree on its grid: {sorted(grids)}"]
    count: dict[tuple[int, ...], int] = defaultdict(int)
    for cell in cells:
        if is_main_replica(cell.replica_id):
            count[tuple(cell.global_offset)] += 1
    problems = [f"{key}: {n} main replicas of object {at}, expected 1" for at, n in count.items() if n != 1]
    if len(count) != prod(cells[0].global_shape):
        problems.append(f"{key}: {len(count)} of {prod(cells[0].global_shape)} objects are there")
    return problems


# ---- checkpoints and strategies ----


def validate_sharded_objects_handling(
    sharded_strategy: SaveShardedStrategy | LoadShardedStrategy,
    common_strategy: SaveCommonStrategy | LoadCommonStrategy,
) -> None:
    """Raise if neither strategy handles sharded objects."""
    if not (sharded_strategy.can_handle_sharded_objects or common_strategy.can_handle_sharded_objects):
        raise CheckpointingException(
            f"{type(sharded_strategy).__name__} and {type(common_strategy).__name__} cannot do ShardedObject"
        )


def verify_checkpoint_and_load_strategy(
    checkpoint_dir: str | Path,
    sharded_strategy: LoadShardedStrategy | tuple[str, int] | None = None,
    common_strategy: LoadCommonStrategy | tuple[str, int] | None = None,
) -> tuple[LoadShardedStrategy, LoadCommonStrategy]:
    """Strategies that read the checkpoint in `checkpoint_dir`. Raises if there is none."""
    config = maybe_load_config(checkpoint_dir)
    if config is None:
        what = "is not a complete distributed checkpoint" if Path(checkpoint_dir).exists() else "does not exist"
        raise CheckpointingException(f"{checkpoint_dir} {what}")
    sharded = resolve_load_strategy(
        StrategyAction.LOAD_SHARDED, sharded_strategy, config.sharded_backend, config.sharded_backend_version
    )
    common = resolve_load_strategy(
        StrategyAction.LOAD_COMMON, common_strategy, config.common_backend, config.common_backend_version
    )
    assert isinstance(sharded, LoadShardedStrategy) and isinstance(common, LoadCommonStrategy)
    return sharded, common


def resolve_load_strategy(
    action: StrategyAction, given: LoadStrategyBase | tuple[str, int] | None, backend: str, version: int
) -> LoadStrategyBase:
    """`given` if it reads `backend`, or the default."""
    if isinstance(given, tuple):
        given = get_default_strategy(action, *given)  # type: ignore[assignment]
    strategy = get_default_strategy(action, backend, version) if given is None else given
    assert isinstance(strategy, LoadStrategyBase)
    strategy.check_backend_compatibility(backend)
    strategy.check_version_compatibility(version)
    return strategy
