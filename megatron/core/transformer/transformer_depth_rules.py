"""Rules of TransformerConfig about its depth: which layers are recomputed, which stage holds which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.config_rules import require, require_one_of, shown
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe")

SPLIT_FIELDS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


# --- recompute ------------------------------------------------------------------------------------


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Whether selective recompute covers `module`, one of `RECOMPUTE_MODULES`."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def imply_recompute_of_experts(config: TransformerConfig) -> None:
    """`moe_layer_recompute` is the older spelling of selective recompute of `moe`."""
    if config.moe_layer_recompute:
        require(
            config.recompute_granularity != "full",
            "moe_layer_recompute is selective recompute; it does not work with recompute_granularity 'full'",
        )
        config.recompute_granularity = "selective"
        config.recompute_modules = [*(config.recompute_modules or ()), "moe"]


def require_complete_recompute(config: TransformerConfig) -> None:
    """Full recompute says which layers; selective recompute says which parts."""
    if config.recompute_granularity is None:
        return
    require_one_of(config, "recompute_granularity", ("full", "selective"))
    if config.recompute_granularity == "full":
        require(
            config.recompute_method in ("block", "uniform"),
            f"recompute_granularity 'full' needs recompute_method 'block' or 'uniform', found "
            f"{config.recompute_method!r}",
        )
        require(
            config.recompute_num_layers is not None and config.recompute_num_layers > 0,
            f"recompute_granularity 'full' needs a positive count in {shown(config, 'recompute_num_layers')}",
        )
    else:
        require(
            config.recompute_num_layers is None,
            f"{shown(config, 'recompute_num_layers')} has no meaning with recompute_granularity 'selective'",
        )
        require(
            config.recompute_method is None,
            f"{shown(config, 'recompute_method')} has no meaning with recompute_granularity 'selective'",
        )
    if config.distribute_saved_activations:
        require(
            not config.sequence_parallel,
            "distribute_saved_activations splits what sequence_parallel has split already; switch one off",
        )


def derive_recompute_modules(config: TransformerConfig) -> None:
    """Selective recompute starts with the attention core: most memory for least work."""
    if config.recompute_modules is None:
        config.recompute_modules = ["core_attn"]


def require_known_recompute_modules(config: TransformerConfig) -> None:
    """Only named parts of a layer can be recomputed, and some exist only with other settings."""
    modules = config.recompute_modules or []
    if config.recompute_granularity != "selective":
        return
    unknown = [module for module in modules if module not in RECOMPUTE_MODULES]
    require(not unknown, f"recompute_modules {unknown} are unknown; choose from {', '.join(RECOMPUTE_MODULES)}")
    if "moe_act" in modules:
        require(config.moe_grouped_gemm, "recompute_modules moe_act needs moe_grouped_gemm")
    if "mla_up_proj" in modules:
        require(config.multi_latent_attention, "recompute_modules mla_up_proj needs multi_latent_attention")
    if config.fp8:
        require(
            not {"moe_act", "layernorm"} & set(modules),
            "recompute_modules moe_act and layernorm do not work with fp8",
        )


# --- pipeline stages ------------------------------------------------------------------------------


def require_one_way_of_splitting(config: TransformerConfig) -> None:
    """Counts for the edge stages, counting embedding and loss, or a layout: three ways to say one thing."""
    first_last, account = SPLIT_FIELDS[:2], SPLIT_FIELDS[2:]
    given = [name for name in first_last if getattr(config, name) is not None]
    counted = [name for name in account if getattr(config, name)]
    require(
        not (given and counted),
        f"{', '.join(given)} and {', '.join(counted)} exclude each other; choose one way to uneven stages",
    )
    if config.pipeline_model_parallel_layout is not None:
        require(
            not given and not counted,
            f"pipeline_model_parallel_layout and {', '.join(given + counted)} exclude each other",
        )


def derive_chunks_from_layout(config: TransformerConfig) -> None:
    """A layout is parsed once, holds the model's layers, and says how many chunks each rank has."""
    given: Any = config.pipeline_model_parallel_layout
    if given is None:
        return
    if not isinstance(given, PipelineParallelLayerLayout):
        given = PipelineParallelLayerLayout(given, config.pipeline_model_parallel_size)
        config.pipeline_model_parallel_layout = given
    given.validate_layer_layout(config.num_layers, config.mtp_num_layers)
    chunks = given.virtual_pipeline_model_parallel_size
    if config.virtual_pipeline_model_parallel_size is None and chunks > 1:
        config.virtual_pipeline_model_parallel_size = chunks
    require(
        (config.virtual_pipeline_model_parallel_size or 1) == chunks,
        f"pipeline_model_parallel_layout {given} has {chunks} stages for each of the "
        f"{shown(config, 'pipeline_model_parallel_size')} ranks, found "
        f"{shown(config, 'virtual_pipeline_model_parallel_size')}",
    )


def require_edge_stages_fit(config: TransformerConfig) -> None:
    """What the first and last stages leave is shared equally by the stages between them."""
    stages, layers = config.pipeline_model_parallel_size, config.num_layers
    chunks = config.virtual_pipeline_model_parallel_size or 1
    given = [name for name in SPLIT_FIELDS[:2] if getattr(config, name) is not None]
    if not given:
        return
    for name in given:
        layers, stages = layers - getattr(config, name), stages - 1
        require(getattr(config, name) > 0, f"{shown(config, name)} must be positive")
        require(
            getattr(config, name) % chunks == 0,
            f"{shown(config, name)} must be divisible by the {chunks} model chunks of a stage",
        )
    found = shown(config, "num_layers", *given, "pipeline_model_parallel_size")
    require(stages >= 0 and layers >= 0 and (stages > 0 or layers == 0), f"{found} do not fit each other")
    if stages > 0:
        require(
            layers % stages == 0 and layers > 0,
            f"{found}: the {layers} remaining layers must share equally among {stages} stages",
        )
        require(
            layers // stages % chunks == 0,
            f"{found}: {layers // stages} layers per stage must be divisible by "
            f"{shown(config, 'virtual_pipeline_model_parallel_size')}",
        )


def require_counted_stages_fit(config: TransformerConfig) -> None:
    """With embedding or loss counted as a layer, the stages are equal in that count."""
    counted = [name for name in SPLIT_FIELDS[2:] if getattr(config, name)]
    if not counted:
        return
    total, stages = config.num_layers + len(counted), config.pipeline_model_parallel_size
    require(
        total % stages == 0,
        f"{shown(config, 'num_layers')} plus {len(counted)} for {' and '.join(counted)} must be divisible by "
        f"{shown(config, 'pipeline_model_parallel_size')}",
    )
    chunks = config.virtual_pipeline_model_parallel_size or 1
    require(
        total // stages % chunks == 0,
        f"{total // stages} layers per stage must be divisible by "
        f"{shown(config, 'virtual_pipeline_model_parallel_size')}",
    )


def require_layers_share_equally(config: TransformerConfig) -> None:
    """Without another instruction every stage and chunk holds the same number of layers."""
    if config.pipeline_model_parallel_layout is not None or any(getattr(config, name) for name in SPLIT_FIELDS):
        return
    parts = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    require(
        config.num_layers % parts == 0,
        f"{shown(config, 'num_layers')} must be divisible by {parts} (pipeline stages times model chunks); "
        "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage allow uneven stages",
    )


DEPTH_RULES: tuple[Any, ...] = (
    imply_recompute_of_experts,
    require_complete_recompute,
    derive_recompute_modules,
    require_known_recompute_modules,
    require_one_way_of_splitting,
    derive_chunks_from_layout,
    require_edge_stages_fit,
    require_counted_stages_fit,
    require_layers_share_equally,
)
