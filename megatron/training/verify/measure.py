"""Train a few steps by the program's own code, and keep what can be compared between layouts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config
from megatron.training.arguments import parse_args
from megatron.training.evaluation import evaluate
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.run import Run
from megatron.training.train_step import StepResult
from megatron.training.training import set_up, train
from megatron.training.verify import tensors
from megatron.training.verify.batches import SAMPLES_OF_FAMILY
from megatron.training.verify.modes import Float64, Reordered, widen
from megatron.training.verify.tensors import WholeTensors

VOCABULARY = (
    "embedding.word_embeddings.weight",
    *(f"{head}output_layer.{part}" for head in ("", "lm_head.") for part in ("weight", "bias")),
)
"""Tensors whose rows are padded to a size that depends on the layout."""


@dataclass(frozen=True)
class Program:
    """What a training program is made of."""

    model_provider: Callable[..., nn.Module]
    forward_step: Callable[..., Any]
    model_type: ModelType = ModelType.encoder_or_decoder
    args_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values for flags that are not given, the family of the model among them."""


@dataclass
class Measurement:
    """What a run computed, in terms that no layout changes. Padding of the vocabulary is cut off."""

    initial: WholeTensors
    gradients: WholeTensors
    """Of the first step, over the whole batch, before clipping."""
    final: WholeTensors
    losses: list[float]
    grad_norms: list[float]
    """Before clipping."""
    batch_sizes: list[int]
    validation_loss: float
    """After the last step, on samples that training has not seen."""
    padding_gradient: float
    """Largest absolute gradient of a row that only pads the vocabulary."""


@dataclass(frozen=True)
class Samples:
    """Which samples a run sees."""

    uneven: bool = False
    seed: int = 0


@dataclass
class _Recorder:
    """Collects what this rank knows while the loop runs."""

    gradient_pieces: list[tensors.Piece] | None = None
    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)

    def watch_gradients(self, run: Run) -> None:
        """Note the gradients of the first step as soon as they are finished."""
        config = get_model_config(run.model[0])
        finish = config.finalize_model_grads_func

        def finish_and_note(model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
            finish(model, *args, **kwargs)
            if self.gradient_pieces is None:
                scale = 1.0 / float(run.optimizer.get_loss_scale())
                pieces = tensors.pieces_of(model, tensors.gradients(run.optimizer))
                self.gradient_pieces = [replace(piece, values=piece.values * scale) for piece in pieces]

        for chunk in run.model:
            get_model_config(chunk).finalize_model_grads_func = finish_and_note

    def note_step(self, run: Run, result: StepResult) -> None:
        """An action of the training loop."""
        self.losses.append(result.losses.get("lm loss"))
        self.grad_norms.append(result.grad_norm)
        self.consumed.append(run.state.consumed_train_samples)


def measure(
    program: Program,
    argv: Sequence[str],
    samples: Samples,
    *,
    in_float64: bool = False,
    rounded_to: torch.dtype = torch.float32,
    reordered: int | None = None,
) -> Measurement | None:
    """Train as `argv` says on samples made for the purpose; the measurement on rank 0, None elsewhere.

    torch.distributed may be initialised already, with as many ranks as the flags are for.

    Args:
        in_float64: compute everything in float64, from the same initial weights.
        rounded_to: with `in_float64`, the type to which the initial weights are rounded first.
        reordered: compute sums of matrix products in another order, which depends on this number.
    """
    mode = Float64() if in_float64 else None
    another_order = contextlib.nullcontext() if reordered is None else Reordered(reordered)
    with mode or contextlib.nullcontext(), another_order:
        initialize_megatron(
            args_defaults=dict(program.args_defaults), parsed_args=parse_args(argv=list(argv)), for_training=True
        )
        run = set_up(
            _data_provider(samples),
            _provider(program.model_provider, mode, rounded_to),
            program.model_type,
            program.forward_step,
        )
        recorder = _Recorder()
        recorder.watch_gradients(run)
        initial = tensors.gather(tensors.pieces_of(run.model, tensors.weights))
        train(run, [recorder.note_step])
        for chunk in run.model:
            chunk.finish_param_sync()  # type: ignore[operator]
        final = tensors.gather(tensors.pieces_of(run.model, tensors.weights))
        validation = evaluate(run.forward_step_func, run.validation_sets[0], run.model)
        assert validation is not None and recorder.gradient_pieces is not None
        gradients = tensors.gather(recorder.gradient_pieces)
        rows = _from_last_stage((recorder.losses, validation[0].get("lm loss")))
        if initial is None or final is None or gradients is None:
            return None
        return _measurement(initial, gradients, final, rows, recorder)


def _provider(provider: Callable[..., nn.Module], mode: Float64 | None, rounded_to: torch.dtype) -> Any:
    if mode is None:
        return provider

    def provide_in_float64(*args: Any, **kwargs: Any) -> nn.Module:
        with mode.paused():
            model = provider(*args, **kwargs)
        return widen(model, rounded_to)

    return provide_in_float64


def _data_provider(samples: Samples) -> Callable[..., Any]:
    def provide(sizes: list[int]) -> tuple[Any, Any, Any]:
        train_size, valid_size, _ = sizes
        kind: Any = SAMPLES_OF_FAMILY[get_args().model_family or "gpt"]
        make = lambda size, seed: kind(get_args(), get_tokenizer(), size, uneven=samples.uneven, seed=seed)  # noqa: E731
        # The loop may ask for one batch more than it trains on.
        return make(train_size, 2 * samples.seed), make(max(valid_size, 1), 2 * samples.seed + 1), None

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def _from_last_stage(mine: tuple[list[float | None], float | None]) -> tuple[list[float], float]:
    """Losses as the last pipeline stage knows them, on rank 0. Communicates: gather."""
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    first = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine if is_last else None, everyone)
    known = [rows for rows in everyone or [] if rows is not None]
    return known[0] if known else ([], numpy.nan)


def _measurement(
    initial: list[tensors.Piece],
    gradients: list[tensors.Piece],
    final: list[tensors.Piece],
    rows: tuple[list[float], float],
    recorder: _Recorder,
) -> Measurement:
    whole = [tensors.assemble(pieces) for pieces in (initial, gradients, final)]
    vocab_size, padding = get_tokenizer().vocab_size, 0.0
    for part in whole:
        for name in VOCABULARY:
            if name in part.tensors:
                rest = part.tensors[name][vocab_size:]
                padding = max(padding, float(abs(rest).max())) if part is whole[1] and rest.size else padding
                part.tensors[name] = part.tensors[name][:vocab_size]
    return Measurement(
        *whole,
        losses=rows[0],
        grad_norms=[numpy.nan if norm is None else norm for norm in recorder.grad_norms],
        batch_sizes=[int(n) for n in numpy.diff([0, *recorder.consumed])],
        validation_loss=rows[1],
        padding_gradient=padding,
    )
