"""The mark that makes a directory a distributed checkpoint: `metadata.json`, written after everything
else."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .durable.file import replace_durably

CONFIG_FNAME = "metadata.json"


class CheckpointingException(Exception):
    """A checkpoint cannot be written or read; the message says which file, tensor or object is the reason."""


@dataclass
class CheckpointingConfig:
    """Which formats the two halves of a checkpoint are written in.

    `sharded_backend` names the format of tensors and sharded objects, `common_backend` that of everything
    else.
    """

    sharded_backend: str
    sharded_backend_version: int = 1
    common_backend: str = "torch"
    common_backend_version: int = 1


def check_is_distributed_checkpoint(checkpoint_dir: str | Path) -> bool:
    """Whether `checkpoint_dir` holds a complete distributed checkpoint."""
    return maybe_load_config(checkpoint_dir) is not None


def maybe_load_config(checkpoint_dir: str | Path) -> CheckpointingConfig | None:
    """The formats of the checkpoint in `checkpoint_dir`; None if it is not a complete distributed
    checkpoint."""
    path = Path(checkpoint_dir) / CONFIG_FNAME
    try:
        content = json.loads(path.read_text())
        return CheckpointingConfig(**content)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (ValueError, TypeError) as error:
        raise CheckpointingException(f"{path} is not valid checkpoint metadata: {error}") from error


def save_config(config: CheckpointingConfig, checkpoint_dir: str | Path) -> None:
    """Mark `checkpoint_dir` complete. The file reaches the disk whole or not at all."""
    replace_durably(Path(checkpoint_dir) / CONFIG_FNAME, json.dumps(asdict(config)).encode())
