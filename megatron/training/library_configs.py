"""The library's configuration objects, made from the settings of a program."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.torch_fully_sharded_data_parallel_config import TorchFullyShardedDataParallelConfig
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.config.spellings import SPELLINGS, Spelling
from megatron.training.settings import refuse_unless

Config = TypeVar("Config")


def values_for(config_class: type, args: argparse.Namespace) -> dict[str, Any]:
    """Those fields of `config_class` that `args` holds, under their own or their flag's name."""
    values = {}
    for field in fields(config_class):
        spelling = SPELLINGS.get(field.name, Spelling())
        dest = spelling.dest or field.name
        if hasattr(args, dest):
            value = getattr(args, dest)
            values[field.name] = not value if spelling.inverted else value
    return values


def core_transformer_config_from_args(
    args: argparse.Namespace, config_class: type[TransformerConfig] | None = None
) -> TransformerConfig:
    """The transformer's configuration for a program's settings.

    Args:
        config_class: TransformerConfig or a subclass; default: the one that the settings ask for.

    Raises:
        ValueError: the settings do not fit each other.
    """
    if config_class is None:
        config_class = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    refuse_unless(
        not (args.multi_latent_attention and args.heterogeneous_layers_config_path),
        "--multi-latent-attention and --heterogeneous-layers-config-path exclude each other",
    )
    values = values_for(config_class, args) | activation_values(args)
    values["pipeline_dtype"] = args.params_dtype
    values["fp8_param"] = args.fp8_param_gather
    values["batch_p2p_comm"] = not args.overlap_p2p_comm
    values["deallocate_pipeline_outputs"] = True
    values["use_cpu_initialization"] = bool(args.use_cpu_initialization)
    if args.init_method_xavier_uniform:
        values["init_method"] = torch.nn.init.xavier_uniform_
    if not args.group_query_attention:
        values["num_query_groups"] = None
    if args.cp_comm_type is not None and len(args.cp_comm_type) == 1:
        values["cp_comm_type"] = args.cp_comm_type[0]
    if args.window_size is not None:
        values["window_size"] = tuple(args.window_size)
    if args.mtp_num_layers is None:
        values["mtp_loss_scaling_factor"] = None
    return config_class(**values)


def two_stack_configs_from_args(args: argparse.Namespace) -> tuple[TransformerConfig, TransformerConfig]:
    """(decoder's, encoder's) configuration of an encoder-decoder model."""
    decoder = {"num_layers": args.decoder_num_layers}
    encoder = {
        "num_layers": args.encoder_num_layers,
        "pipeline_model_parallel_size": args.encoder_pipeline_model_parallel_size or 1,
        "pipeline_model_parallel_split_rank": None,
        "pipeline_schedule": "auto",  # the pipeline's is in the decoder's
    }
    variants = (argparse.Namespace(**(vars(args) | changes)) for changes in (decoder, encoder))
    decoder_config, encoder_config = (core_transformer_config_from_args(variant) for variant in variants)
    return decoder_config, encoder_config


def activation_values(args: argparse.Namespace) -> dict[str, Any]:
    """The activation that the switches choose, and whether its fused form is used."""
    if args.swiglu:
        return {
            "activation_func": silu,
            "gated_linear_unit": True,
            "bias_activation_fusion": args.bias_swiglu_fusion,
        }
    if args.geglu:
        return {"activation_func": gelu, "gated_linear_unit": True, "bias_activation_fusion": True}
    if args.squared_relu:
        return {"activation_func": squared_relu, "bias_activation_fusion": False}
    return {"bias_activation_fusion": args.bias_gelu_fusion}


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al., arXiv:2109.08668)."""
    return relu(x).square()


def optimizer_config_from_args(args: argparse.Namespace) -> OptimizerConfig:
    """The optimizer's configuration for a program's settings."""
    return OptimizerConfig(**values_for(OptimizerConfig, args))


def ddp_config_from_args(
    args: argparse.Namespace, *, num_parameters: int | None = None, dp_cp_size: int = 1
) -> DistributedDataParallelConfig:
    """The data parallel configuration for a program's settings.

    Args:
        num_parameters: of this rank, needed where the flags give the number of buckets instead of their size.
        dp_cp_size: data and context parallel ranks, which set the default size of a bucket.
    """
    values = values_for(DistributedDataParallelConfig, args)
    values["bucket_size"] = bucket_size(args, num_parameters, dp_cp_size)
    if args.use_torch_fsdp2:
        reshard = args.torch_fsdp2_reshard_after_forward
        return TorchFullyShardedDataParallelConfig(**values, reshard_after_forward=reshard)
    return DistributedDataParallelConfig(**values)


def bucket_size(args: argparse.Namespace, num_parameters: int | None, dp_cp_size: int) -> int | None:
    """Elements per bucket. Without overlap one bucket is fastest; with it, more ranks want larger ones."""
    if not args.overlap_grad_reduce:
        return None
    if args.ddp_num_buckets is not None and num_parameters is not None:
        return num_parameters // args.ddp_num_buckets
    if args.ddp_bucket_size is not None:
        return args.ddp_bucket_size
    return max(40_000_000, 1_000_000 * dp_cp_size)
