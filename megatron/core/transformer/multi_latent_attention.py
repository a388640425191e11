"""Attention whose keys and values are functions of a narrow latent of each token (DeepSeek-V2, arXiv:2405.04434,
section 2.1), cut by heads over the tensor parallel ranks.

s sequence, b microbatch, h hidden, a heads; a head's queries and keys have n channels that do not rotate and r that do,
its values v; c is the rank of the latent of keys and values.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_features,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.quantized_weight import QuantizedWeight
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.rotary import apply_rotary_pos_emb, packed_angles, yarn_mscale
from megatron.core.transformer.rotary_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_depth_rules import recomputes
from megatron.core.transformer.yarn_rotary_embedding import YarnRotaryEmbedding
from megatron.core.utils import get_pg_size


@dataclass
class MLASelfAttentionSubmodules:
    """Parts of `MLASelfAttention`: `linear_q_proj`, or where there is a `q_lora_rank` the two of its latent."""

    linear_q_proj: ModuleSpec | type | None = None
    linear_q_down_proj: ModuleSpec | type | None = None
    linear_q_up_proj: ModuleSpec | type | None = None
    linear_kv_down_proj: ModuleSpec | type | None = None
    linear_kv_up_proj: ModuleSpec | type | None = None
    core_attention: ModuleSpec | type | None = None
    linear_proj: ModuleSpec | type | None = None
    q_layernorm: ModuleSpec | type | None = None
    kv_layernorm: ModuleSpec | type | None = None


class MultiLatentAttention(Attention):
    """What latent attention does once there are latents; where they come from is the subclass's matter.

    hidden_states [s, b, h] (sequence parallel [s/tp, b, h]) -> [s, b, h]. The scale of the scores is g² / sqrt(n + r),
    where g is YaRN's temperature for `rotary_scaling_factor` and `mscale`. Positions rotate r channels of each query,
    and of one key that all heads share.
    """

    config: MLATransformerConfig

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        self.q_head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        super().__init__(
            config,
            submodules,  # type: ignore[arg-type]
            layer_number,
            attn_mask_type,
            attention_type,
            cp_comm_type,
            model_comm_pgs,
        )
        self.rotary_pos_emb = rotary_embedding_of(config, self.model_comm_pgs.cp)
        self.recompute_up_proj = recomputes(config, "mla_up_proj")

    def context_width(self) -> int:
        return self.config.v_head_dim

    def cache_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """(bytes that the latent of a token, with its key's rotating channels, takes in a context, 0)."""
        return (self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim) * dtype.itemsize, 0

    def scale_of_scores(self) -> float | None:
        config = self.config
        if config.softmax_scale is not None:
            return config.softmax_scale
        width = config.qk_head_dim + config.qk_pos_emb_head_dim
        return yarn_mscale(config.rotary_scaling_factor, config.mscale) ** 2 / math.sqrt(width)

    @abstractmethod
    def down_project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what queries are made of, latents of keys and values, the keys' rotating channels [s, b, r])."""

    @abstractmethod
    def queries(self, source: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
        """[s, b, a/tp, n] and [s, b, a/tp, r], the latter rotated, of the first result of `down_project`."""

    @abstractmethod
    def normed(self, latents: Tensor) -> Tensor:
        """Latents of keys and values as the up projection, and a cache, take them."""

    @abstractmethod
    def keys_and_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, a/tp, n] and [s, b, a/tp, v] of normed latents."""

    @abstractmethod
    def up_projection_of_heads(self) -> tuple[Tensor, Tensor]:
        """Its matrices of keys [a/tp, n, c] and of values [a/tp, v, c]."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        position_ids: Tensor | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [s, b, h], bias to be added or None); arguments as of `Attention.forward`, except:

        Args:
            inference_context: keeps the normed latent and the rotated key of each token, c + r numbers; new tokens
                attend to them in latent space. Needs `rotary_pos_emb`.
            rotary_pos_emb: angles of the r channels, [s, 1, 1, r] or by sample [s, b, 1, r], of `rotary_embedding_of`;
                None: the layer's own, for positions from 0.
            position_ids: unused, angles say where tokens are.

        Raises:
            NotImplementedError: a context with a mask, a bias, packed sequences, or context parallelism.
            ValueError: a context without angles.
        """
        context = inference_context if inference_context is not None else inference_params
        parts = self.down_project(hidden_states)
        if context is not None:
            self._require_cacheable(attention_mask, packed_seq_params, attention_bias)
            if rotary_pos_emb is None and not self.skip_rope:
                raise ValueError("with a context, tokens are not the first ones: hand in the angles of their positions")
            return self.linear_proj(self._attend_to_latents(*parts, rotary_pos_emb, context))
        angles = self._angles(parts[-1], rotary_pos_emb, packed_seq_params)
        again = CheckpointWithoutOutput() if self.recompute_up_proj and self.training else None

        def up_project(query_source: Tensor, latents: Tensor, shared_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _of_one_width(*self._up_project(query_source, latents, shared_key, angles))

        query, key, value = up_project(*parts) if again is None else again.checkpoint(up_project, *parts)
        attended = self._attend(query, key, value, attention_mask, attention_bias, packed_seq_params)
        if again is not None:
            again.discard_output_and_register_recompute(attended)
        return self.linear_proj(self._without_padding(attended))

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: BaseInferenceContext | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query and key [s, b, a/tp, n + r], rotated, and value [s, b, a/tp, v] of a whole sequence."""
        parts = self.down_project(hidden_states)
        return self._up_project(*parts, self._angles(parts[-1], None, packed_seq_params))

    def _up_project(
        self, query_source: Tensor, latents: Tensor, shared_key: Tensor, angles: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries = torch.cat(self.queries(query_source, angles), dim=-1)
        keys, values = self.keys_and_values(self.normed(latents))
        rotated = self._rotated(shared_key.unsqueeze(2), angles).expand(-1, -1, keys.size(2), -1)
        return queries, torch.cat((keys, rotated), dim=-1), values

    def _without_padding(self, context: Tensor) -> Tensor:
        """[s, b, a/tp * v] of heads that may be wider than their values."""
        heads = context.unflatten(-1, (self.num_attention_heads_per_partition, -1))
        return heads[..., : self.config.v_head_dim].flatten(2)

    # --- positions ---

    def _angles(
        self,
        shared_key: Tensor,
        given: Tensor | tuple[Tensor, Tensor] | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor | None:
        """Of the tokens in `shared_key` [s, b, r]; None where nothing rotates."""
        if self.skip_rope:
            return None
        cp, (tokens, samples) = self.model_comm_pgs.cp, shared_key.shape[:2]
        table: Any = given
        if table is None:
            table = self.rotary_pos_emb(tokens * get_pg_size(cp), 0, packed_seq_params is not None)
        if isinstance(table, tuple):
            table = table[0]
        return table if packed_seq_params is None else packed_angles(table, packed_seq_params, tokens, samples, cp)

    def _rotated(self, channels: Tensor, angles: Tensor | None) -> Tensor:
        if angles is None:
            return channels
        mscale = self.rotary_pos_emb.mscale if isinstance(self.rotary_pos_emb, YarnRotaryEmbedding) else 1.0
        return apply_rotary_pos_emb(channels, angles, self.config, mscale=mscale)

    # --- one token after the other ---

    def _attend_to_latents(
        self,
        source: Tensor,
        latents: Tensor,
        shared_key: Tensor,
        angles: Tensor | tuple[Tensor, Tensor] | None,
        context: BaseInferenceContext,
    ) -> Tensor:
        """[s, b, a/tp * v] of new tokens, which see those that the context has kept.

        The up projections of keys and values move to the other side of the products, to queries and results
        (arXiv:2405.04434, section 2.1.3): all heads look at one key a token, which is its value too.
        """
        tp, config = self.model_comm_pgs.tp, self.config
        latents = self.normed(latents)
        if config.sequence_parallel:
            latents = gather_from_sequence_parallel_region(latents, group=tp)
        turns: Any = None if self.skip_rope else angles[0] if isinstance(angles, tuple) else angles
        plain, rotated = self.queries(source, turns)
        of_keys, of_values = self.up_projection_of_heads()
        absorbed = torch.einsum("sban,anc->sbac", plain, of_keys.to(plain.dtype))
        key = torch.cat((latents.unsqueeze(2), self._rotated(shared_key.unsqueeze(2), turns)), dim=-1)
        query = torch.cat((absorbed, rotated), dim=-1)
        scale = self.core_attention.softmax_scale
        found = context.attend(self.layer_number, query, key, None, scale, config.window_size)
        of_latents = found.unflatten(-1, (plain.size(2), -1))[..., : config.kv_lora_rank]
        return torch.einsum("sbac,avc->sbav", of_latents, of_values.to(found.dtype)).flatten(2)


class MLASelfAttention(MultiLatentAttention):
    """Latents of queries (rank `q_lora_rank`, or none) and of keys and values (`kv_lora_rank`) by projections of the
    hidden states, each with its norm where `qk_layernorm` asks for it.

    Down projections are cut by rows over the tensor parallel ranks, and their results gathered (sequence parallel:
    exchanged for those of this rank's tokens); up projections are cut by heads. Rows of a head: `linear_q_up_proj` (or
    `linear_q_proj`) n, then r; `linear_kv_up_proj` n of the key, then v of the value. `linear_kv_down_proj` has c rows,
    then the r of the key that all heads share.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, model_comm_pgs)
        heads, h = config.num_attention_heads, config.hidden_size
        self.q_layernorm: Any = None
        if config.q_lora_rank is None:
            self.linear_q_proj = self._projection(submodules.linear_q_proj, h, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = self._projection(submodules.linear_q_down_proj, h, config.q_lora_rank)
            self.linear_q_up_proj = self._projection(
                submodules.linear_q_up_proj, config.q_lora_rank, heads * self.q_head_dim
            )
            self.q_layernorm = self._norm(submodules.q_layernorm, config.q_lora_rank)
        rank = config.kv_lora_rank
        self.linear_kv_down_proj = self._projection(
            submodules.linear_kv_down_proj, h, rank + config.qk_pos_emb_head_dim
        )
        self.linear_kv_up_proj = self._projection(
            submodules.linear_kv_up_proj, rank, heads * (config.qk_head_dim + config.v_head_dim)
        )
        self.kv_layernorm = self._norm(submodules.kv_layernorm, rank)

    def _projection(self, spec: ModuleSpec | type | None, input_size: int, output_size: int) -> Any:
        return build_module(
            spec,  # type: ignore[arg-type]
            input_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.model_comm_pgs.tp,
        )

    def _norm(self, spec: ModuleSpec | type | None, width: int) -> Any:
        if spec is None or spec is IdentityOp:
            return None
        return build_module(spec, hidden_size=width, config=self.config, eps=self.config.layernorm_epsilon)

    def down_project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, tp = self.config, self.model_comm_pgs.tp
        source = hidden_states
        if config.q_lora_rank is not None:
            source = gather_features(self.linear_q_down_proj(hidden_states)[0], config.sequence_parallel, tp)
        both = gather_features(self.linear_kv_down_proj(hidden_states)[0], config.sequence_parallel, tp)
        latents, shared_key = both.split((config.kv_lora_rank, config.qk_pos_emb_head_dim), dim=-1)
        # Each rank's heads give a part of this key's gradient.
        if config.sequence_parallel:
            return source, latents, gather_from_sequence_parallel_region(shared_key, group=tp)
        return source, latents, copy_to_tensor_model_parallel_region(shared_key, tp)

    def queries(self, source: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.config.q_lora_rank is None:
            projected, _ = self.linear_q_proj(source)
        else:
            source = source if self.q_layernorm is None else self.q_layernorm(source)
            projected, _ = self.linear_q_up_proj(source)
        heads = projected.unflatten(-1, (self.num_attention_heads_per_partition, self.q_head_dim))
        plain, rotating = heads.split((self.config.qk_head_dim, self.config.qk_pos_emb_head_dim), dim=-1)
        return plain, self._rotated(rotating, angles)

    def normed(self, latents: Tensor) -> Tensor:
        return latents if self.kv_layernorm is None else self.kv_layernorm(latents)

    def keys_and_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        projected, _ = self.linear_kv_up_proj(latents)
        heads = projected.unflatten(-1, (self.num_attention_heads_per_partition, -1))
        keys, values = heads.split((self.config.qk_head_dim, self.config.v_head_dim), dim=-1)
        return keys, values

    def up_projection_of_heads(self) -> tuple[Tensor, Tensor]:
        whole = self.linear_kv_up_proj.weight
        whole = whole.dequantized() if isinstance(whole, QuantizedWeight) else whole
        weight = whole.unflatten(0, (self.num_attention_heads_per_partition, -1))
        of_keys, of_values = weight.split((self.config.qk_head_dim, self.config.v_head_dim), dim=1)
        return of_keys, of_values


def rotary_embedding_of(config: MLATransformerConfig, cp_group: ProcessGroup | None) -> RotaryEmbedding:
    """The angles of the rotating channels, of the configuration's `rope_type`."""
    common: dict[str, Any] = {
        "kv_channels": config.qk_pos_emb_head_dim,
        "rotary_percent": config.rotary_percent,
        "rotary_base": config.rotary_base,
        "cp_group": cp_group,
    }
    if config.rope_type == "rope":
        return RotaryEmbedding(**common)
    return YarnRotaryEmbedding(
        **common,
        scaling_factor=config.rotary_scaling_factor,
        original_max_position_embeddings=config.max_position_embeddings,
        beta_fast=config.beta_fast,
        beta_slow=config.beta_slow,
        mscale=config.mscale,
        mscale_all_dim=config.mscale_all_dim,
    )


def _of_one_width(*heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [s, b, a, ...] of the widest one's width, filled with zeros: kernels of attention, and
    the exchange of heads between context parallel ranks, know one width."""
    width = max(x.size(-1) for x in heads)
    query, key, value = (x if x.size(-1) == width else pad(x, (0, width - x.size(-1))) for x in heads)
    return query, key, value
