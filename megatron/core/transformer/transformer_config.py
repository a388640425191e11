"""Everything that shapes a transformer: sizes, norms, attention, experts, recompute, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config_rules import LATENT_ATTENTION_RULES, TRANSFORMER_RULES

BalancingType = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]
"""Ways of `moe_router_load_balancing_type`."""


@dataclass
class TransformerConfig(ModelParallelConfig):
    """Settings of a transformer block and its parallel layout.

    Each field's docstring is also the help of the flag that carries its name. `transformer_config_rules.py`
    holds the rules that fill and check the fields; after construction no library code assigns to a setting.
    """

    # --- architecture ---
    num_layers: int = 0
    """Layers of the transformer."""
    mtp_num_layers: int | None = None
    """Extra modules that predict tokens further ahead; unset is none."""
    mtp_loss_scaling_factor: float | None = None
    """Weight of the mean loss of those modules."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers on the first pipeline stage; unset is an equal share."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers on the last pipeline stage; unset is an equal share."""
    pipeline_model_parallel_layout: str | list[Any] | PipelineParallelLayerLayout | None = None
    """What each stage holds, stages parted by `|`: E embedding, t layer, m extra prediction, L loss."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are shared out over stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and loss as one layer when layers are shared out over stages."""
    hidden_size: int = 0
    """Width of the residual stream."""
    num_attention_heads: int = 0
    """Query heads of each attention layer."""
    attention_backend: AttnBackend = AttnBackend.auto
    """Kernels of the attention core: flash, fused, unfused, local, or auto for the fastest that fits."""
    softmax_scale: float | None = None
    """Factor on the attention scores; unset is 1/sqrt(head width)."""
    num_query_groups: int | None = None
    """Key/value heads, each shared by a group of query heads; unset gives each query head its own."""
    ffn_hidden_size: int | None = None
    """Inner width of the feed-forward block; unset is four times the hidden size."""
    kv_channels: int | None = None
    """Width of one attention head; unset is hidden size / heads."""
    hidden_dropout: float = 0.1
    """Dropout on what each block adds to the residual stream."""
    attention_dropout: float = 0.1
    """Dropout on the attention probabilities."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in float32."""
    apply_residual_connection_post_layernorm: bool = False
    """Take the residual after the norm instead of before it (as the first BERT did)."""
    layernorm_epsilon: float = 1e-05
    """Added to the variance inside a norm."""
    layernorm_zero_centered_gamma: bool = False
    """Store a norm's gain as its difference from one."""
    add_bias_linear: bool = True
    """Linear layers have a bias."""
    add_qkv_bias: bool = False
    """The query/key/value projection has a bias, also where other linear layers have none."""
    gated_linear_unit: bool = False
    """Multiply the activation with a second projection of the input (as in SwiGLU and GeGLU)."""
    activation_func: Callable[[Tensor], Tensor] = torch.nn.functional.gelu
    """Activation of the feed-forward block."""
    activation_func_fp8_input_store: bool = False
    """Keep the activation's input for backward in fp8."""
    num_moe_experts: int | None = None
    """Experts of each mixture-of-experts layer; unset is a dense model."""
    rotary_interleaved: bool = False
    """Rotate neighbouring channels in pairs rather than the two halves of a head."""
    window_size: tuple[int, int] | None = None
    """Keys that a query sees to its left and right (sliding window); -1 is no limit on that side."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head."""
    test_mode: bool = False
    """Run the checks that are meant for tests of the library."""
    calculate_per_token_loss: bool = False
    """Average the loss over the tokens of the global batch, not per microbatch."""
    multi_latent_attention: bool = False
    """Attention through a low-rank latent of keys and values."""
    no_rope_freq: int | list[int] | None = None
    """Layers without rotary positions: every n-th, or a list with 1 for each such layer."""
    moe_deepep_num_sms: int = 20
    """Streaming multiprocessors that the DeepEP kernels may use."""

    # --- YaRN positions of ordinary attention (arXiv:2309.00071) ---
    yarn_rotary_scaling_factor: float | None = None
    """How many times longer than the original context positions may become (YaRN)."""
    yarn_original_max_position_embeddings: int | None = None
    """Context length that the model was trained with before YaRN stretched it."""
    yarn_beta_fast: float = 32.0
    """Channels that turn more often than this over the original context keep their frequency (YaRN)."""
    yarn_beta_slow: float = 1.0
    """Channels that turn less often than this are interpolated fully (YaRN)."""
    yarn_mscale: float = 1.0
    """Strength of YaRN's attention temperature."""
    yarn_mscale_all_dim: float = 0.0
    """Divides YaRN's attention temperature by that of this strength."""

    # --- initialisation ---
    init_method: Callable[[Tensor], Any] | None = None
    """Fills the weights of input projections; unset draws from N(0, init_method_std)."""
    output_layer_init_method: Callable[[Tensor], Any] | None = None
    """Fills the projections into the residual stream; unset is the former, smaller by sqrt(2 x layers)."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    init_model_with_meta_device: bool = False
    """Build the model without storage first and fill it when it is sharded."""

    # --- numerics ---
    apply_query_key_layer_scaling: bool = False
    """Divide attention scores by the layer's number and undo it in the softmax, for float16's range."""
    attention_softmax_in_fp32: bool = True
    """Compute the attention softmax in float32."""
    disable_bf16_reduced_precision_matmul: bool = False
    """Accumulate bfloat16 matrix products in float32 throughout."""

    # --- fusion ---
    bias_activation_fusion: bool = False
    """Add the bias and apply the activation in one kernel."""
    masked_softmax_fusion: bool = False
    """Scale, mask and softmax attention scores in one kernel."""
    persist_layer_norm: bool = False
    """Use the persistent norm kernel where there is one."""
    memory_efficient_layer_norm: bool = False
    """Keep a norm's output instead of its input for backward."""
    bias_dropout_fusion: bool = False
    """Add bias, dropout and residual in one kernel."""
    apply_rope_fusion: bool = False
    """Rotate queries and keys in one kernel."""

    # --- recompute ---
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward: `full` for whole layers, `selective` for chosen parts of each."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers `full` covers: `uniform` all, in equal chunks; `block` the first ones of each stage."""
    recompute_num_layers: int | None = None
    """Layers per chunk (`uniform`), or layers per stage (`block`)."""
    distribute_saved_activations: bool | None = None
    """Split what recompute saves over the tensor parallel ranks."""
    recompute_modules: list[str] | None = None
    """Parts that `selective` recomputes; unset is the attention core."""

    # --- fp8 ---
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Number format of fp8: `e4m3`, or `hybrid` with e5m2 gradients."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] | None = "delayed"
    """How fp8 scales are chosen."""
    fp8_param: bool = False
    """Keep weights in fp8."""
    fp8_margin: int = 0
    """Headroom of delayed scaling, in powers of two."""
    fp8_interval: int = 1
    """No effect."""
    fp8_amax_history_len: int = 1
    """Steps of maxima that delayed scaling looks back on."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of those maxima sets the scale."""
    fp8_wgrad: bool = True
    """Compute weight gradients in fp8 too."""
    fp8_dot_product_attention: bool = False
    """Compute the attention core in fp8."""
    fp8_multi_head_attention: bool = False
    """Keep the whole attention layer in fp8."""
    tp_only_amax_red: bool = False
    """Share maxima among tensor parallel ranks only."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers in bfloat16."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers."""
    use_kitchen: bool = False
    """Take quantization recipes from the kitchen package."""

    # --- mixture of experts ---
    moe_shared_expert_intermediate_size: int | None = None
    """Total inner width of the experts that see every token; unset is none."""
    moe_shared_expert_gate: bool = False
    """Multiply their result by a learnt gate for each token."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared experts while tokens travel to the others."""
    moe_layer_freq: int | list[int] = 1
    """Which layers hold experts: every n-th, or a list with 1 for each such layer."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one expert; unset is that of the feed-forward block."""
    moe_router_load_balancing_type: BalancingType | list[BalancingType] = "aux_loss"
    """How tokens are spread evenly over experts: a loss over a micro-batch, over each sequence, over the batch so far,
    several of these, an assignment, or nothing."""
    moe_router_topk: int = 2
    """Experts that see each token."""
    moe_router_topk_limited_devices: int | None = None
    """Older spelling of a limit on the expert groups of a token."""
    moe_router_padding_for_fp8: bool | None = False
    """Pad each expert's tokens to a count that fp8 products accept."""
    moe_router_num_groups: int | None = None
    """Groups that experts are divided into for limited routing."""
    moe_router_group_topk: int | None = None
    """Groups that one token's experts may come from."""
    moe_router_pre_softmax: bool = False
    """Normalise routing scores before experts are chosen, not after."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the scores of the chosen experts."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns router outputs into scores."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router; unset is that of the model."""
    moe_router_enable_expert_bias: bool = False
    """Balance experts by a bias on their scores that follows their load, without a loss."""
    moe_router_bias_update_rate: float = 0.001
    """Step of that bias."""
    moe_router_force_load_balancing: bool = False
    """Route at random and evenly (for benchmarks)."""
    moe_grouped_gemm: bool = False
    """Compute a rank's experts in one grouped matrix product."""
    moe_use_legacy_grouped_gemm: bool = False
    """No effect: there is one grouped product."""
    moe_aux_loss_coeff: float | list[float] = 0
    """Weight of the load balancing loss; of several, one for each."""
    moe_z_loss_coeff: float | None = None
    """Weight of the loss that keeps router outputs small."""
    moe_input_jitter_eps: float | None = None
    """Multiply the router's input by noise of this width."""
    moe_token_dropping: bool = False
    """No effect: a capacity factor decides whether tokens are dropped."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "allgather"
    """How tokens travel to their experts."""
    moe_enable_deepep: bool = False
    """Use the DeepEP kernels for that (dispatcher `flex`)."""
    moe_per_layer_logging: bool = False
    """Log the router's losses for each layer."""
    moe_expert_capacity_factor: float | None = None
    """Tokens that an expert takes, relative to an even share; unset or negative is no limit."""
    moe_pad_expert_input_to_capacity: bool = False
    """Pad every expert's tokens to that limit."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens are dropped above the limit: the least probable, or the last ones."""
    moe_layer_recompute: bool = False
    """Older spelling of selective recompute of the expert layer."""
    moe_permute_fusion: bool = False
    """Sort tokens by expert in one kernel."""
    moe_apply_probs_on_input: bool = False
    """Scale a token before its expert instead of after (one expert per token)."""

    # --- context parallelism ---
    cp_comm_type: str | list[str] | None = None
    """How context parallel ranks meet each other's keys, for all layers or for each: p2p (a ring, the default),
    all_gather, a2a (heads for tokens) or a2a+p2p (both, in nested groups)."""

    # --- CUDA graphs ---
    enable_cuda_graph: bool = False
    """Run layers as CUDA graphs, captured one by one (`transformer.cuda_graphs`)."""
    cuda_graph_use_single_mempool: bool = False
    """All graphs share one memory pool."""
    cuda_graph_retain_backward_graph: bool = False
    """Keep the autograd graph of a captured backward."""
    cuda_graph_warmup_steps: int = 3
    """Backward passes of a layer before it is captured; at least one."""
    external_cuda_graph: bool = False
    """The training program captures the graphs."""
    cuda_graph_scope: Literal["full", "attn"] = "full"
    """Capture whole layers, or only attention."""

    # --- other ---
    clone_scatter_output_in_embedding: bool = True
    """Copy this rank's part of the embedding, so that the whole can be freed (sequence parallelism)."""
    disable_parameter_transpose_cache: bool = False
    """Do not cache transposed fp8 weights."""
    config_logger_dir: str = ""
    """Folder to write configurations to; empty writes none."""
    flash_decode: bool = False
    """Decode with a kernel that updates the key/value cache in place."""
    inference_rng_tracker: bool = False
    """Keep random states the way inference wants them."""
    symmetric_ar_type: Literal["two_shot", "one_shot", "multimem_all_reduce"] | None = None
    """All-reduce kernel on symmetric memory, for inference."""
    mrope_section: list[int] | None = None
    """Channels of rotary positions for time, height and width."""
    is_hybrid_model: bool = False
    """The model mixes attention with state space layers."""
    mamba_state_dim: int = 128
    """State width of a state space layer."""
    mamba_head_dim: int = 64
    """Head width of a state space layer."""
    mamba_num_groups: int = 8
    """Groups of a state space layer."""
    mamba_num_heads: int | None = None
    """Heads of a state space layer; unset follows from its width."""
    use_mamba_mem_eff_path: bool = True
    """Recompute inside the state space kernel rather than store."""
    mlp_chunks_for_prefill: int = 1
    """Pieces of the sequence that the feed-forward block takes one after the other in prefill."""
    heterogeneous_block_specs: bool = False
    """Layers differ in shape."""
    hetereogenous_dist_checkpoint: bool = False
    """Store each layer's weights under its own key."""
    quant_recipe: Any | None = None
    """Quantization recipe per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for rule in TRANSFORMER_RULES:
            rule(self)


@dataclass
class MLATransformerConfig(TransformerConfig):
    """Settings of a transformer with multi-latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    multi_latent_attention: bool = True
    """Attention through a low-rank latent of keys and values."""
    q_lora_rank: int | None = 512
    """Rank of the queries' latent; unset projects queries directly."""
    kv_lora_rank: int = 512
    """Rank of the keys' and values' latent."""
    qk_head_dim: int = 128
    """Channels per query and key head that do not rotate."""
    qk_pos_emb_head_dim: int = 64
    """Channels per query and key head that rotate."""
    v_head_dim: int = 128
    """Width of a value head."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    """Kind of norm."""
    rope_type: Literal["rope", "yarn"] = "yarn"
    """Rotary positions: plain `rope`, or `yarn`."""
    rotary_base: float = 10000
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of the rotating channels that do rotate."""
    rotary_scaling_factor: float = 40
    """How many times longer than the original context positions may become (YaRN)."""
    max_position_embeddings: int = 4096
    """Context length of the original model (YaRN)."""
    beta_fast: float = 32
    """Channels that turn more often than this over the original context keep their frequency (YaRN)."""
    beta_slow: float = 1
    """Channels that turn less often than this are interpolated fully (YaRN)."""
    mscale: float = 0.707
    """Strength of YaRN's attention temperature."""
    mscale_all_dim: float = 0.707
    """Strength of YaRN's attention temperature over all channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for rule in LATENT_ATTENTION_RULES:
            rule(self)
