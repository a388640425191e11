"""`--moe-use-upcycling`: a run with experts that begins with the weights of a dense one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.collective import on_first_rank, together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_into
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.validation import parse_strict_flag
from megatron.core.export import WholeStateLoadStrategy
from megatron.core.export.upcycling import Upcycled, Upcycling
from megatron.core.export.weights import is_gated, pattern_of_layers
from megatron.core.transformer.moe.upcycling_utils import output_scale
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.conversion import load_own
from megatron.training.checkpoint.find import candidates
from megatron.training.checkpoint.save import save_run
from megatron.training.checkpoint.state import load_model, sharded_model
from megatron.training.train_state import TrainState
from megatron.training.utils import gather_weights, print_rank_0

FIRST_ITERATION = 1
"""Where the run stands."""


def load_upcycled(args: argparse.Namespace, model: list[nn.Module], optimizer: Any | None) -> TrainState:
    """Fill the model from the dense checkpoint of `--load` and save it to `--save` as iteration 1; all ranks call this.

    Raises:
        CheckpointingException: on every rank, before anything is changed: there is no dense checkpoint, it is of other
            sizes, or `--save` holds checkpoints already.
    """
    folder = args.load or args.pretrained_checkpoint
    on_first_rank("cannot begin with a dense checkpoint", lambda: _require_free(args, folder))
    print_rank_0(f" making experts of the dense model in {folder}")
    gather_weights(model)
    with together(f"cannot load {folder}"):
        try:
            strategy = WholeStateLoadStrategy(Upcycled(load_own(folder, "gpt").state, how_of(args)))
        except ValueError as error:
            raise CheckpointingException(f"{folder}: {error}") from error
    strict = parse_strict_flag(args.dist_ckpt_strictness)
    common = TorchCommonLoadStrategy()
    request = sharded_model(model, {})
    contents, _, _ = load_into({}, request, Path(folder), strategy, common, strict, validate_access_integrity=False)
    load_model(model, contents, strict=True)
    if optimizer is not None:
        optimizer.reload_model_params()
    state = TrainState(iteration=FIRST_ITERATION)
    save_run(args, state, model, None, None, CheckpointContext())
    print_rank_0(f"  upcycled checkpoint saved to {args.save}")
    return state


def how_of(args: argparse.Namespace) -> Upcycling:
    """The experts that the settings ask for."""
    layers = pattern_of_layers(args.moe_layer_freq, args.num_layers)
    mixed = [f"decoder.layers.{number}" for number, mixture in enumerate(layers) if mixture]
    if layers[-1]:
        mixed += [f"mtp.layers.{number}.transformer_layer" for number in range(args.mtp_num_layers or 0)]
    return Upcycling(
        num_experts=args.num_experts,
        granularity=args.moe_upcycling_granularity,
        layers=frozenset(mixed),
        hidden_size=args.hidden_size,
        gated=is_gated(vars(args)),
        output_scale=output_scale(args, args.num_experts, args.moe_upcycling_granularity),
        init_std=args.init_method_std,
        seed=args.seed,
        expert_bias=args.moe_router_enable_expert_bias,
    )


def _require_free(args: argparse.Namespace, folder: str | None) -> None:
    if folder is None:
        raise CheckpointingException("--moe-use-upcycling needs --load with the checkpoint of a dense model")
    if candidates(argparse.Namespace(**{**vars(args), "ckpt_step": None, "pretrained_checkpoint": None}), "save"):
        raise CheckpointingException(
            f"--save {args.save} has checkpoints already: --moe-use-upcycling is for the first start of a run, leave "
            "it out to go on from them"
        )
