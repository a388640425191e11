"""Interfaces of the parts that write and read a checkpoint, and the table of those that are used by
default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from pathlib import Path

from ..core import CheckpointingException
from ..durable import FileRecord
from ..mapping import ShardedStateDict, StateDict
from .async_utils import AsyncCallsQueue, AsyncRequest
from .file_plan import FilePlan


class StrategyAction(Enum):
    """What a strategy does."""

    LOAD_COMMON = "load_common"
    LOAD_SHARDED = "load_sharded"
    SAVE_COMMON = "save_common"
    SAVE_SHARDED = "save_sharded"


class LoadStrategyBase(ABC):  # what its two kinds have in common
    """Reads checkpoints of some formats."""

    def check_backend_compatibility(self, loaded_backend: str) -> None:  # no limits by default
        """Raise `CheckpointingException` if the checkpoint's format is not one that this strategy reads."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Raise `CheckpointingException` if the checkpoint's version is not one that this strategy reads."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Whether `ShardedObject`s are read too."""
        return False


class SaveStrategyBase(ABC):  # what its two kinds have in common
    """Writes checkpoints of one format and version."""

    def __init__(self, backend: str, version: int) -> None:
        self.backend = backend
        self.version = version

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Whether `ShardedObject`s are written too."""
        return False

    def own_files(self, directory: Path) -> list[Path]:
        """Files of this format in a directory, the one that makes the others readable first."""
        return []


class LoadCommonStrategy(LoadStrategyBase):
    """Reads the part of a checkpoint that all ranks share."""

    @abstractmethod
    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        """The common state dict."""

    def load_sharded_objects(
        self, sharded_objects_state_dict: ShardedStateDict, checkpoint_dir: str | Path
    ) -> StateDict:
        """Sharded objects, where the sharded strategy does not read them."""
        raise NotImplementedError(f"{type(self).__name__} cannot read sharded objects")

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedStateDict]:
        """Unique key -> sharded object, without data, of those that this strategy reads."""
        if not self.can_handle_sharded_objects:
            return {}
        raise NotImplementedError(f"{type(self).__name__} cannot list sharded objects")


class LoadShardedStrategy(LoadStrategyBase):
    """Reads tensors and objects by their place in the global state."""

    @abstractmethod
    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        """The state dict with each sharded value replaced by what was read. All ranks call this."""

    @abstractmethod
    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedStateDict]:
        """Name -> whole tensor without data, of each tensor in the checkpoint."""

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedStateDict]:
        """As `load_tensors_metadata`, and the objects under their unique keys."""
        if not self.can_handle_sharded_objects:
            return self.load_tensors_metadata(checkpoint_dir)
        raise NotImplementedError(f"{type(self).__name__} cannot list sharded objects")

    def remove_sharded_tensors(self, checkpoint_dir: str | Path, key_prefix: str) -> None:
        """Drop the tensors and objects whose name starts with `key_prefix` from a checkpoint."""
        raise NotImplementedError(f"{type(self).__name__} cannot remove tensors")


class SaveCommonStrategy(SaveStrategyBase):
    """Writes the part of a checkpoint that all ranks share."""

    @abstractmethod
    def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord] | None:
        """Write the common state dict; what the files must be to be whole, if that is known. All ranks call this, the
        first one writes."""

    def plan_common(self, common_state_dict: StateDict) -> list[FilePlan] | None:
        """The files that this rank would write; None if this strategy only writes by itself."""
        return None

    def save_sharded_objects(self, sharded_objects_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write sharded objects, where the sharded strategy does not."""
        raise NotImplementedError(f"{type(self).__name__} cannot write sharded objects")


class SaveShardedStrategy(SaveStrategyBase):
    """Writes tensors and objects under their place in the global state."""

    @abstractmethod
    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord] | None:
        """Write the sharded values of all ranks; what this rank's files must be to be whole, if that is known. All
        ranks call this."""

    def plan_sharded(self, sharded_state_dict: ShardedStateDict) -> list[FilePlan] | None:
        """The files that this rank would write; None if this strategy only writes by itself. All ranks call this."""
        return None


class AsyncSaveShardedStrategy(SaveShardedStrategy):
    """Can write in the background."""

    @abstractmethod
    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> AsyncRequest:
        """Copy what is to be written; the rest is left to the request. All ranks call this."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord] | None:
        """Write at once."""
        self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()
        return None


async_calls = AsyncCallsQueue()
"""A queue for programs that have none of their own."""

_default_strategies: dict[tuple[StrategyAction, str, int], LoadStrategyBase | SaveStrategyBase] = {}


def register_default_strategy(
    action: StrategyAction, backend: str, version: int, strategy: LoadStrategyBase | SaveStrategyBase
) -> None:
    """Use `strategy` wherever nothing else is asked for."""
    _default_strategies[action, backend, version] = strategy


def get_default_strategy(action: StrategyAction, backend: str, version: int) -> LoadStrategyBase | SaveStrategyBase:
    """The strategy used by default for a format and its version."""
    try:
        return _default_strategies[action, backend, version]
    except KeyError:
        known = sorted(f"{b} version {v}" for a, b, v in _default_strategies if a is action)
        raise CheckpointingException(
            f"cannot {action.value.replace('_', ' ')} state as {backend!r} version {version}; "
            f"known formats: {', '.join(known)}"
        ) from None
