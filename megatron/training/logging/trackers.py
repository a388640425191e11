"""Where the numbers of a run go besides the log: TensorBoard, wandb and a JSON-lines file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass
class Trackers:
    """The trackers that are switched on; each may be None."""

    tensorboard: Any = None
    wandb: Any = None
    metrics: IO[str] | None = None

    def log(self, values: dict[str, float], iteration: int, consumed_samples: int | None = None) -> None:
        """Note scalars of an iteration; with `consumed_samples` TensorBoard also gets `… vs samples`."""
        for name, value in values.items():
            if self.tensorboard is not None:
                self.tensorboard.add_scalar(name, value, iteration)
                if consumed_samples is not None:
                    self.tensorboard.add_scalar(f"{name} vs samples", value, consumed_samples)
        if self.wandb is not None:
            samples = {} if consumed_samples is None else {"samples vs steps": consumed_samples}
            self.wandb.log(values | samples, step=iteration)

    def record(self, row: dict[str, Any]) -> None:
        """Append one line to the metrics file, flushed so that a kill loses nothing; nan and infinities are null."""
        if self.metrics is not None:
            strict = {name: None if _is_not_finite(value) else value for name, value in row.items()}
            self.metrics.write(json.dumps(strict, allow_nan=False) + "\n")
            self.metrics.flush()

    def flush(self) -> None:
        """Write out what is buffered."""
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def close(self) -> None:
        """Finish all of them."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.metrics is not None:
            self.metrics.close()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def open_trackers(args: Any) -> Trackers:
    """Open what the flags ask for; only the rank that logs calls this."""
    return Trackers(_open_tensorboard(args), _open_wandb(args), _open_metrics(args))


def _open_tensorboard(args: Any) -> Any:
    if not args.tensorboard_dir:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError("--tensorboard-dir needs the package tensorboard: pip install tensorboard") from error
    writer = SummaryWriter(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size)
    for name in sorted(vars(args)):
        writer.add_text(name, str(getattr(args, name)), global_step=0)
    return writer


def _open_wandb(args: Any) -> Any:
    if not args.wandb_project:
        return None
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError("--wandb-project needs the package wandb: pip install wandb") from error
    folder = args.wandb_save_dir or os.path.join(args.save or ".", "wandb")
    os.makedirs(folder, exist_ok=True)
    config = {name: value if _is_plain(value) else str(value) for name, value in vars(args).items()}
    wandb.init(dir=folder, name=args.wandb_exp_name, project=args.wandb_project, config=config)
    return wandb


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _open_metrics(args: Any) -> IO[str] | None:
    path = args.metrics_jsonl or (os.path.join(args.save, "metrics.jsonl") if args.save else None)
    if path is None:
        return None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", encoding="utf-8")
