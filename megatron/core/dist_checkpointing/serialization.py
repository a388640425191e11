"""`save` and `load`: a state dict of shards to a directory, and into the shards of any other layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .collective import on_first_rank, together
from .core import CONFIG_FNAME, CheckpointingConfig, CheckpointingException, save_config
from .dict_utils import dict_list_map_outplace, extract_matching_values, merge, restore_lists
from .durable import FileRecord, sync_directory
from .manifest import MANIFEST_FNAME, write_manifest
from .mapping import (
    CommonStateDict,
    LocalNonpersistentObject,
    ShardedBase,
    ShardedStateDict,
    ShardedTensorFactory,
    StateDict,
    apply_factory_merges,
)
from .strategies import common as _common  # noqa: F401  # registers the default strategy
from .strategies import safetensors as _safetensors  # noqa: F401  # registers the default strategy
from .strategies import torch as _torch  # noqa: F401  # registers the default strategy
from .strategies.async_utils import AsyncRequest
from .strategies.background import BackgroundSaver
from .strategies.base import (
    AsyncSaveShardedStrategy,
    LoadCommonStrategy,
    LoadShardedStrategy,
    SaveCommonStrategy,
    SaveShardedStrategy,
    SaveStrategyBase,
    StrategyAction,
    get_default_strategy,
)
from .strategies.file_plan import FilePlan, write_together
from .strategies.sharded_files import gather_to_first
from .validation import (
    CkptShardedMetadata,
    StrictHandling,
    determine_global_metadata,
    parse_strict_flag,
    validate_integrity_and_strict_load,
    validate_sharded_objects_handling,
    validate_sharding_integrity,
    verify_checkpoint_and_load_strategy,
)

logger = logging.getLogger(__name__)

CONTENT_METADATA = "content_metadata"
COMMON_FORMATS = {"torch_dist": ("torch", 1), "safetensors": ("json", 1)}
"""Format of tensors -> format of the common state, if nothing else is asked for."""


# ---- saving ----


def save(
    sharded_state_dict: ShardedStateDict,
    checkpoint_dir: str | Path,
    sharded_strategy: SaveShardedStrategy | tuple[str, int] | None = None,
    common_strategy: SaveCommonStrategy | tuple[str, int] | None = None,
    validate_access_integrity: bool = True,
    async_sharded_save: bool = False,
    preprocess_common_before_consistancy_check: Callable[[CommonStateDict], StateDict] | None = None,
    content_metadata: dict | None = None,
    *,
    background_saver: BackgroundSaver | None = None,
) -> AsyncRequest | None:
    """Write a checkpoint into the existing directory `checkpoint_dir`. All ranks call this.

    The directory is a checkpoint from the moment that its `metadata.json` is there, which is written last, after the
    manifest with the size and the checksum of each file. If any rank fails, all ranks raise and the files of the
    attempt are removed.

    Args:
        sharded_state_dict: tree of sharded values, which all ranks write together, and of other ones, of
            which those of the first rank are written.
        checkpoint_dir: where; the same for all ranks, on a file system that they share.
        sharded_strategy, common_strategy: how, or (format, version).
        validate_access_integrity: check first that the shards of all ranks make up the global state exactly,
            and log where the common state of ranks differs.
        async_sharded_save: only copy the state; the returned request does the rest, see `AsyncCallsQueue`.
        preprocess_common_before_consistancy_check: leaves out of that comparison what may differ.
        content_metadata: anything that a reader needs to know to request the right state, see
            `load_content_metadata`.
        background_saver: keeps the memory, and if it is persistent the process, from one asynchronous save to the next.
    """
    directory = Path(checkpoint_dir)
    sharded, common = split_for_saving(sharded_state_dict)
    if content_metadata is not None:
        common[CONTENT_METADATA] = content_metadata
    if validate_access_integrity:
        check_before_saving(sharded, common, preprocess_common_before_consistancy_check)
    save_sharded = resolve_save_strategy(StrategyAction.SAVE_SHARDED, sharded_strategy, ("torch_dist", 1))
    beside = COMMON_FORMATS.get(save_sharded.backend, ("torch", 1))
    save_common = resolve_save_strategy(StrategyAction.SAVE_COMMON, common_strategy, beside)
    assert isinstance(save_sharded, SaveShardedStrategy) and isinstance(save_common, SaveCommonStrategy)
    validate_sharded_objects_handling(save_sharded, save_common)
    attempt = _Attempt(directory, save_sharded, save_common)
    on_first_rank(f"cannot save to {directory}", attempt.make_room)
    try:
        if async_sharded_save:
            return attempt.begin(common, sharded, background_saver)
        attempt.complete(attempt.write(common, sharded))
    except CheckpointingException:
        attempt.clean()
        raise
    return None


@dataclass(frozen=True)
class _Attempt:
    """A save into one directory. All methods but `make_room` are called by all ranks."""

    directory: Path
    sharded: SaveShardedStrategy
    common: SaveCommonStrategy

    def make_room(self) -> None:
        """Make a directory that holds an older checkpoint, whole or not, empty of it."""
        if not self.directory.is_dir():
            raise CheckpointingException("the directory does not exist")
        if any(self.directory.iterdir()):
            logger.warning("overwriting the checkpoint in %s", self.directory)
            self._remove_files()

    def _remove_files(self) -> None:
        """Remove a checkpoint's files, the one that declares it complete first. Other files stay."""
        marks = [self.directory / name for name in (CONFIG_FNAME, MANIFEST_FNAME)]
        for path in (*marks, *self.sharded.own_files(self.directory), *self.common.own_files(self.directory)):
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".partial").unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what a failed save has left."""
        on_first_rank(f"cannot clean {self.directory}", self._remove_files)

    def plans(self, common: CommonStateDict, sharded: ShardedStateDict) -> list[FilePlan] | None:
        """The files of this rank; None if one of the strategies only writes by itself."""
        of_common: list[FilePlan] | None = []
        with together("cannot plan the checkpoint"):
            of_common = self.common.plan_common(common)
        if of_common is None:
            return None
        of_sharded = self.sharded.plan_sharded(sharded)
        return None if of_sharded is None else [*of_common, *of_sharded]

    def write(self, common: CommonStateDict, sharded: ShardedStateDict) -> dict[str, FileRecord] | None:
        """Write everything but the marks; the records of this rank's files, if the strategies know them."""
        plans = self.plans(common, sharded)
        if plans is not None:
            return write_together(lambda: plans, self.directory)
        of_common = self.common.save_common(common, self.directory)
        of_sharded = self.sharded.save(sharded, self.directory)
        return None if of_common is None or of_sharded is None else {**of_common, **of_sharded}

    def begin(self, common: CommonStateDict, sharded: ShardedStateDict, saver: BackgroundSaver | None) -> AsyncRequest:
        """Copy everything; the request writes it."""
        if not isinstance(self.sharded, AsyncSaveShardedStrategy):
            raise NotImplementedError(f"{type(self.sharded).__name__} cannot write in the background")
        plans = self.plans(common, sharded)
        if plans is None:
            self.common.save_common(common, self.directory)
            request = self.sharded.async_save(sharded, self.directory)
            request.add_finalize_fn(lambda: self.complete(None))
            return request
        used = saver or BackgroundSaver()
        with together(f"cannot copy the state to be saved to {self.directory}"):
            staged = used.stage(plans, self.directory)
        finish: list[Callable[[], Any]] = [lambda: self.complete(staged.records)]
        return AsyncRequest(staged.write, (), finish if saver is not None else [used.close, *finish])

    def complete(self, records: dict[str, FileRecord] | None) -> None:
        """Declare the directory a complete checkpoint, once all its files are on the disk."""
        everything = gather_to_first(records)
        on_first_rank(f"cannot complete {self.directory}", lambda: self._publish(everything or []))

    def _publish(self, everything: list[dict[str, FileRecord] | None]) -> None:
        known = [records for records in everything if records is not None]
        if len(known) == len(everything):
            write_manifest(self.directory, {name: r for records in known for name, r in records.items()})
        sync_directory(self.directory)
        formats = (self.sharded.backend, self.sharded.version, self.common.backend, self.common.version)
        save_config(CheckpointingConfig(*formats), self.directory)
        sync_directory(self.directory)


def split_for_saving(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, CommonStateDict]:
    """(sharded values with factories built, values that all ranks share). The argument is not changed."""
    state = build_factories(sharded_state_dict)
    _, persistent = extract_matching_values(state, _is_nonpersistent, return_lists_as_dicts=True)
    sharded, common = extract_matching_values(persistent, _is_sharded, return_lists_as_dicts=True)
    common = restore_lists(common, state)
    assert isinstance(sharded, dict) and isinstance(common, dict)
    return sharded, common


def build_factories(sharded_state_dict: ShardedStateDict) -> ShardedStateDict:
    """A copy of the tree with each factory replaced by its parts; one without parts becomes a value that is
    not saved."""

    def build(value: Any) -> Any:
        if not isinstance(value, ShardedTensorFactory):
            return value
        return value.build() or LocalNonpersistentObject([])

    return dict_list_map_outplace(build, sharded_state_dict)


def check_before_saving(
    sharded: ShardedStateDict,
    common: CommonStateDict,
    preprocess_common: Callable[[CommonStateDict], StateDict] | None,
) -> None:
    """Compare the ranks' states; the same exception is raised everywhere."""
    _, global_metadata = determine_global_metadata(sharded)
    validate_sharding_integrity(global_metadata, preprocess_common(common) if preprocess_common else common)


def resolve_save_strategy(
    action: StrategyAction, given: SaveStrategyBase | tuple[str, int] | None, default: tuple[str, int]
) -> SaveStrategyBase:
    """`given`, or the strategy of that format, or the default."""
    strategy = get_default_strategy(action, *(given or default)) if given is None or isinstance(given, tuple) else given
    assert isinstance(strategy, SaveStrategyBase)
    return strategy


def _is_sharded(value: Any) -> bool:
    return isinstance(value, ShardedBase)


def _is_nonpersistent(value: Any) -> bool:
    return isinstance(value, LocalNonpersistentObject)


# ---- loading ----


def load(
    sharded_state_dict: ShardedStateDict,
    checkpoint_dir: str | Path,
    sharded_strategy: LoadShardedStrategy | tuple[str, int] | None = None,
    common_strategy: LoadCommonStrategy | tuple[str, int] | None = None,
    validate_access_integrity: bool = True,
    strict: str | StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED,
) -> StateDict | tuple[StateDict, set[str], set[str]]:
    """State dict with the checkpoint's common values and the requested sharded ones. All ranks call this.

    Tensors are read in place where a shard has data. Before that names and shapes are compared, so that a
    checkpoint of something else changes nothing on any rank.

    Args:
        sharded_state_dict: what is requested, in this program's layout; values that are not sharded are
            ignored.
        checkpoint_dir: a complete checkpoint.
        sharded_strategy, common_strategy: how to read, or (format, version); default by what the directory
            holds.
        validate_access_integrity: check that the ranks together request each tensor exactly once.
        strict: what to do about names that are only requested, or only in the checkpoint.

    Returns:
        The state dict; in the RETURN modes of `strict` also the missing and the unexpected names.
    """
    sharded_reader, common_reader = verify_checkpoint_and_load_strategy(
        checkpoint_dir, sharded_strategy, common_strategy
    )
    state: StateDict = {}
    with together(f"cannot load {checkpoint_dir}"):
        state = common_reader.load_common(Path(checkpoint_dir))
    mode = parse_strict_flag(strict)
    loaded, missing, unexpected = load_into(
        state, sharded_state_dict, Path(checkpoint_dir), sharded_reader, common_reader, mode, validate_access_integrity
    )
    if StrictHandling.requires_returning_mismatch_keys(mode):
        return loaded, missing, unexpected
    return loaded


def load_into(
    state: StateDict,
    sharded_state_dict: ShardedStateDict,
    checkpoint_dir: Path,
    sharded_reader: LoadShardedStrategy,
    common_reader: LoadCommonStrategy,
    mode: StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED,
    validate_access_integrity: bool = True,
) -> tuple[StateDict, set[str], set[str]]:
    """(`state`, the common values of a checkpoint, with the requested sharded ones; missing and unexpected names). All
    ranks call this."""
    requested = build_factories(sharded_state_dict)
    factories, _ = extract_matching_values(
        sharded_state_dict, lambda value: isinstance(value, ShardedTensorFactory), return_lists_as_dicts=True
    )
    nonpersistent, rest = extract_matching_values(requested, _is_nonpersistent, return_lists_as_dicts=True)
    sharded, _ = extract_matching_values(rest, _is_sharded, return_lists_as_dicts=True)
    assert isinstance(sharded, dict)
    if nonpersistent or sharded:
        validate_sharded_objects_handling(sharded_reader, common_reader)
    sharded, missing, unexpected = _match(sharded, checkpoint_dir, sharded_reader, mode, validate_access_integrity)
    merge(state, dict_list_map_outplace(lambda value: value.unwrap(), nonpersistent))
    loaded = sharded_reader.load(sharded, checkpoint_dir)
    merge(state, loaded)
    _drop_not_loaded(factories, state)
    return apply_factory_merges(restore_lists(state, requested), factories), missing, unexpected


def _match(
    sharded: ShardedStateDict,
    checkpoint_dir: Path,
    reader: LoadShardedStrategy,
    mode: StrictHandling,
    validate_access_integrity: bool,
) -> tuple[ShardedStateDict, set[str], set[str]]:
    """What of the request is loaded, and the names that do not match."""
    explicit = StrictHandling.requires_explicit_ckpt_mismatch_check(mode)
    if not (explicit or validate_access_integrity):
        return sharded, set(), set()
    local, everywhere = determine_global_metadata(sharded)
    available: CkptShardedMetadata | None = None
    if explicit:
        with together(f"cannot load {checkpoint_dir}"):
            available = reader.load_sharded_metadata(checkpoint_dir)
    return validate_integrity_and_strict_load(sharded, mode, validate_access_integrity, local, everywhere, available)


def _drop_not_loaded(factories: Any, state: Any) -> None:
    """Remove, in place, the factories of which nothing was loaded because the checkpoint does not have it."""
    for key in list(factories):
        present = key in state if isinstance(state, dict) else key < len(state)
        if not present:
            del factories[key]
        elif isinstance(factories[key], dict):
            _drop_not_loaded(factories[key], state[key])


def load_common_state_dict(checkpoint_dir: str | Path) -> StateDict:
    """The values of a checkpoint that are not sharded."""
    _, reader = verify_checkpoint_and_load_strategy(checkpoint_dir)
    return reader.load_common(Path(checkpoint_dir))


def load_content_metadata(
    checkpoint_dir: str | Path | None = None, *, preloaded_state_dict: StateDict | None = None
) -> dict | None:
    """What `save` was given as `content_metadata`; None if nothing."""
    if preloaded_state_dict is None:
        if checkpoint_dir is None:
            raise ValueError("load_content_metadata needs checkpoint_dir or preloaded_state_dict")
        preloaded_state_dict = load_common_state_dict(checkpoint_dir)
    return preloaded_state_dict.get(CONTENT_METADATA)


def load_tensors_metadata(
    checkpoint_dir: str | Path, sharded_strategy: LoadShardedStrategy | None = None
) -> CkptShardedMetadata:
    """Name -> whole tensor, without data, for each tensor in a checkpoint. Not a collective call."""
    reader, _ = verify_checkpoint_and_load_strategy(checkpoint_dir, sharded_strategy)
    return reader.load_tensors_metadata(Path(checkpoint_dir))


def load_sharded_metadata(
    checkpoint_dir: str | Path,
    sharded_strategy: LoadShardedStrategy | None = None,
    common_strategy: LoadCommonStrategy | None = None,
) -> CkptShardedMetadata:
    """As `load_tensors_metadata`, and the sharded objects under their unique keys."""
    reader, _ = verify_checkpoint_and_load_strategy(checkpoint_dir, sharded_strategy, common_strategy)
    return reader.load_sharded_metadata(Path(checkpoint_dir))


def load_plain_tensors(checkpoint_dir: str | Path) -> StateDict:
    """Name -> whole tensor, on the CPU; every rank gets every tensor."""
    reader, _ = verify_checkpoint_and_load_strategy(checkpoint_dir)
    return reader.load(reader.load_tensors_metadata(Path(checkpoint_dir)), Path(checkpoint_dir))


def remove_sharded_tensors(checkpoint_dir: str | Path, key_prefix: str) -> None:
    """Drop the tensors and objects whose name starts with `key_prefix` from a checkpoint. One rank calls
    this."""
    reader, _ = verify_checkpoint_and_load_strategy(checkpoint_dir)
    reader.remove_sharded_tensors(Path(checkpoint_dir), key_prefix)


def get_default_save_sharded_strategy(backend: str = "torch_dist", version: int = 1) -> SaveShardedStrategy:
    """The strategy that writes sharded values in that format."""
    strategy = get_default_strategy(StrategyAction.SAVE_SHARDED, backend, version)
    assert isinstance(strategy, SaveShardedStrategy)
    return strategy


def get_default_save_common_strategy(backend: str = "torch", version: int = 1) -> SaveCommonStrategy:
    """The strategy that writes common values in that format."""
    strategy = get_default_strategy(StrategyAction.SAVE_COMMON, backend, version)
    assert isinstance(strategy, SaveCommonStrategy)
    return strategy


def get_default_load_sharded_strategy(checkpoint_dir: str | Path) -> LoadShardedStrategy:
    """The strategy that reads the sharded values of a checkpoint."""
    return verify_checkpoint_and_load_strategy(checkpoint_dir)[0]
