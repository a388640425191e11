"""What the application decides about the model beyond the library's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class NetworkSizeConfig:
    """Depth, positions, vocabulary and activation."""

    encoder_num_layers: int | None = None
    """Layers of the encoder in an encoder-decoder model; elsewhere another name of --num-layers."""
    decoder_num_layers: int | None = None
    """Layers of the decoder in an encoder-decoder model."""
    group_query_attention: bool = False
    """Let groups of query heads share keys and values (see --num-query-groups)."""
    max_position_embeddings: int | None = None
    """Longest sequence that the model has positions for; the table's length for learned positions."""
    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "relative", "none", "yarn"] = (
        "learned_absolute"
    )
    """How positions enter the model; yarn (stretched rope) is an addition of this program."""
    relative_attention_num_buckets: int = 32
    """Distance buckets of relative positions."""
    relative_attention_max_distance: int = 128
    """Distance from which on all relative positions share the last bucket."""
    use_rotary_position_embeddings: bool = False
    """Older spelling of --position-embedding-type rope."""
    rotary_base: int = 10000
    """Base (theta) of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of a head's channels that rotate."""
    rotary_seq_len_interpolation_factor: int | None = None
    """Divide rotary positions by this, to stretch the context."""
    use_rope_scaling: bool = False
    """Rescale rotary frequencies as Llama 3.1 does."""
    rope_scaling_factor: float = 8.0
    """How much longer that rescaling makes the context."""
    add_position_embedding: bool = True
    """Older switch for a table of learned positions."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this, times the tensor parallel size."""
    squared_relu: bool = False
    """Activation relu(x)^2 in the feed-forward block."""
    swiglu: bool = False
    """Activation silu, gated by a second projection."""
    geglu: bool = False
    """Activation gelu in its tanh form, gated by a second projection, as in T5 1.1."""
    bert_binary_head: bool = True
    """Give BERT its classifier of sentence pairs."""
    untie_embeddings_and_output_weights: bool = False
    """Separate weights for the input embedding and the output layer."""


@dataclass(kw_only=True)
class HeadConfig:
    """Query/key norms, and sizes of image inputs (the interface keeps them in one group)."""

    qk_l2_norm: bool = False
    """Scale queries and keys to unit length, as Llama 4 does."""
    num_classes: int = 1000
    """Image classes."""
    img_h: int = 224
    """Image height in pixels."""
    img_w: int = 224
    """Image width in pixels."""
    num_channels: int = 3
    """Image channels."""
    patch_dim: int = 16
    """Side of an image patch in pixels."""
    data_sharding: bool = True
    """Give each data parallel rank its own part of the data (cyclic loader)."""


@dataclass(kw_only=True)
class ExpertConfig:
    """Turning a dense model into a mixture of experts."""

    moe_use_upcycling: bool = False
    """Start the experts from a dense checkpoint."""
    moe_upcycling_granularity: int = 1
    """How many times narrower than the dense block such experts are."""


@dataclass(kw_only=True)
class HeterogeneousConfig:
    """Layers that differ in shape."""

    heterogeneous_layers_config_path: str | None = None
    """JSON file that describes each layer."""
    heterogeneous_layers_config_encoded_json: str | None = None
    """The same description as text."""


@dataclass(kw_only=True)
class TransformerEngineConfig:
    """Where the layers come from."""

    transformer_impl: Literal["local", "transformer_engine"] = "transformer_engine"
    """Layers of this library, or Transformer Engine's; without that package, local unless asked for."""


@dataclass(kw_only=True)
class ExperimentalConfig:
    """Layer specs, hybrid models and configuration files."""

    enable_experimental: bool = False
    """Unlock experimental functions."""
    spec: list[str] | None = None
    """Module and function that give the layer spec, or `local`."""
    hybrid_attention_ratio: float = 0.0
    """Share of attention layers in a hybrid model."""
    hybrid_mlp_ratio: float = 0.0
    """Share of feed-forward layers in a hybrid model."""
    hybrid_override_pattern: str | None = None
    """A hybrid model's layers one by one: M state space, * attention, - feed-forward."""
    yaml_cfg: str | None = None
    """YAML file with settings under the same names; flags win over it."""


@dataclass(kw_only=True)
class ConfigurationConfig:
    """How the configuration itself is shown."""

    explain_config: bool = False
    """Print every setting that differs from its default and where it comes from, then stop."""
