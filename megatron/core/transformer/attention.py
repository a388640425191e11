"""Multi-head attention with grouped keys and values (arXiv:1706.03762, arXiv:2305.13245), cut by heads over
the tensor parallel ranks (arXiv:1909.08053, section 3).

s sequence, b microbatch, h hidden, a heads, g query groups, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.activity import communicating
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.context_parallel import attend_across_ranks
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.rotary import apply_rotary_pos_emb, packed_angles, yarn_concentration
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_depth_rules import recomputes
from megatron.core.transformer.utils import groups_or_default, of_layer
from megatron.core.utils import divide, get_pg_size


@dataclass
class SelfAttentionSubmodules:
    """Parts of `SelfAttention`."""

    linear_qkv: ModuleSpec | type | None = None
    core_attention: ModuleSpec | type | None = None
    linear_proj: ModuleSpec | type | None = None
    q_layernorm: ModuleSpec | type | None = None
    k_layernorm: ModuleSpec | type | None = None


@dataclass
class CrossAttentionSubmodules:
    """Parts of `CrossAttention`."""

    linear_q: ModuleSpec | type | None = None
    linear_kv: ModuleSpec | type | None = None
    core_attention: ModuleSpec | type | None = None
    linear_proj: ModuleSpec | type | None = None


class Attention(MegatronModule, ABC):
    """Projections around an attention core; where queries, keys and values come from is the subclasses'
    matter.

    hidden_states [s, b, h] (sequence parallel: [s/tp, b, h], all-gathered by the projection) -> query [s, b,
    a/tp, d], key and value [s, b, g/tp, d] -> core -> [s, b, a/tp * d] -> row-parallel projection
    (all-reduce, or reduce-scatter) -> [s, b, h].

    Args:
        layer_number: 1-based number of the layer in the model.
        attn_mask_type: what a query may see.
        attention_type: "self" or "cross".
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules | CrossAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert config.kv_channels is not None and config.num_query_groups is not None
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.model_comm_pgs = groups_or_default(model_comm_pgs)

        self.query_projection_size = self.context_width() * config.num_attention_heads
        self.kv_projection_size = config.kv_channels * config.num_query_groups
        tp_size = get_pg_size(self.model_comm_pgs.tp)
        self.hidden_size_per_attention_head = config.kv_channels
        self.num_attention_heads_per_partition = divide(config.num_attention_heads, tp_size)
        self.num_query_groups_per_partition = divide(config.num_query_groups, tp_size)

        self.recompute_core = recomputes(config, "core_attn")
        self.skip_rope = bool(config.no_rope_freq and of_layer(config.no_rope_freq, layer_number))
        core = build_module(
            submodules.core_attention,  # type: ignore[arg-type]
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            softmax_scale=self.scale_of_scores(),
            cp_comm_type=cp_comm_type,
            model_comm_pgs=self.model_comm_pgs,
        )
        self.core_attention = attend_across_ranks(core, cp_comm_type, self.model_comm_pgs)
        self.linear_proj = build_module(
            submodules.linear_proj,  # type: ignore[arg-type]
            self.query_projection_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.model_comm_pgs.tp,
        )

    def context_width(self) -> int:
        """Channels of a head that go into the output projection."""
        assert self.config.kv_channels is not None
        return self.config.kv_channels

    def cache_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """(bytes that the key and the value of a token take in a context, 0); none are kept without a causal mask."""
        assert self.config.kv_channels is not None
        if self.attn_mask_type is not AttnMaskType.causal:
            return 0, 0
        return 2 * self.num_query_groups_per_partition * self.config.kv_channels * dtype.itemsize, 0

    def scale_of_scores(self) -> float | None:
        """Factor on the scores; None is 1/sqrt(head width)."""
        return self.config.softmax_scale

    @abstractmethod
    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query [sq, b, a/tp, d], key and value [sk, b, g/tp, d]."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [s, b, h], bias to be added or None).

        Args:
            hidden_states: [s, b, h], sequence parallel [s/tp, b, h].
            attention_mask: bool, True where a key is hidden, broadcasts to [b, a, s, s]; None follows
                `attn_mask_type`.
            key_value_states: what keys and values of cross attention come from.
            rotary_pos_emb: angles [s, 1, 1, rotated width] of both, or a pair for queries and keys.
            attention_bias: added to the scaled scores.
            packed_seq_params: sequences on the token axis that do not see each other.
            inference_context: keys and values of the tokens before these, which it also keeps the new ones with.

        Raises:
            NotImplementedError: it is handed in together with a mask or packed sequences, or to attention that is not
                causal; or with a bias, and it takes none.
        """
        inference_context = inference_context if inference_context is not None else inference_params
        query, key, value = self.get_query_key_value_tensors(hidden_states, key_value_states)
        if rotary_pos_emb is not None and not self.skip_rope:
            query, key = self._rotate(query, key, rotary_pos_emb, packed_seq_params)
        if inference_context is not None:
            self._require_cacheable(attention_mask, packed_seq_params)
            scale, window = self.core_attention.softmax_scale, self.config.window_size
            if attention_bias is None:
                context = inference_context.attend(self.layer_number, query, key, value, scale, window)
            else:
                context = inference_context.attend_with_bias(
                    self.layer_number, query, key, value, scale, attention_bias
                )
        else:
            context = self._attend(query, key, value, attention_mask, attention_bias, packed_seq_params)
        return self.linear_proj(context)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Context [s, b, a/tp * d] by the core, which backward computes again if it is to."""

        def core(query: Tensor, key: Tensor, value: Tensor, attention_bias: Tensor | None) -> Tensor:
            return self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
            )

        if self.recompute_core and self.training:  # scores and probabilities: arXiv:2205.05198, section 5
            return checkpoint(core, False, query, key, value, attention_bias)
        return core(query, key, value, attention_bias)

    def _require_cacheable(
        self,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        attention_bias: Tensor | None = None,
    ) -> None:
        others = (attention_mask, attention_bias, packed_seq_params)
        if any(other is not None for other in others) or self.attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(
                f"keys and values are kept for causal attention without a mask, a bias or packed sequences; this is "
                f"{self.attention_type} attention with a {self.attn_mask_type.name} mask"
            )
        if get_pg_size(self.model_comm_pgs.cp) > 1:
            raise NotImplementedError("keys and values are not kept under context parallelism; generate without it")

    def _rotate(
        self,
        query: Tensor,
        key: Tensor,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor],
        packed_seq_params: PackedSeqParams | None,
    ) -> tuple[Tensor, Tensor]:
        q_angles, k_angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
        if packed_seq_params is not None:
            cp = self.model_comm_pgs.cp
            q_angles = packed_angles(q_angles, packed_seq_params, query.size(0), query.size(1), cp)
            k_angles = packed_angles(k_angles, packed_seq_params, key.size(0), key.size(1), cp)
        mscale = yarn_concentration(self.config)
        query = apply_rotary_pos_emb(query, q_angles, self.config, mscale=mscale)
        key = apply_rotary_pos_emb(key, k_angles, self.config, mscale=mscale)
        return query, key


class SelfAttention(Attention):
    """Queries, keys and values from one fused projection.

    Its rows are, for each query group: the queries of its a/g heads, then its key, then its value.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, model_comm_pgs)
        self.linear_qkv = build_module(
            submodules.linear_qkv,  # type: ignore[arg-type]
            config.hidden_size,
            self.query_projection_size + 2 * self.kv_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.model_comm_pgs.tp,
        )
        self.q_layernorm = self._head_norm(submodules.q_layernorm)
        self.k_layernorm = self._head_norm(submodules.k_layernorm)

    def _head_norm(self, spec: ModuleSpec | type | None) -> Any:
        if spec is None or spec is IdentityOp:
            return None
        eps = self.config.layernorm_epsilon
        return build_module(spec, hidden_size=self.hidden_size_per_attention_head, config=self.config, eps=eps)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query [s, b, a/tp, d], key and value [s, b, g/tp, d] of hidden_states [s, b, h]."""
        mixed, _ = self.linear_qkv(hidden_states)  # [s, b, (a + 2g)/tp * d]
        s, b = mixed.shape[:2]
        d, g = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        query_width = self.num_attention_heads_per_partition // g * d
        query, key, value = mixed.view(s, b, g, query_width + 2 * d).split((query_width, d, d), dim=-1)
        query = query.reshape(s, b, -1, d)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        if self.config.test_mode:
            self.run_realtime_tests()
        return query, key, value

    def run_realtime_tests(self) -> None:
        """Check that the head norms, which every rank holds whole, are equal on all of them. All-gathers over
        dp and tp.

        Raises:
            RuntimeError: they differ.
        """
        norms = [norm for norm in (self.q_layernorm, self.k_layernorm) if norm is not None]
        parameters = [param.detach().flatten() for norm in norms for param in norm.parameters()]
        if not parameters:
            return
        mine = torch.cat(parameters)
        for axis, group in (("data", self.model_comm_pgs.dp), ("tensor", self.model_comm_pgs.tp)):
            if get_pg_size(group) == 1:
                continue
            everyone = [torch.empty_like(mine) for _ in range(get_pg_size(group))]
            with communicating("all-gather", group, of="norms of query and key heads"):
                dist.all_gather(everyone, mine, group=group)
            if not all(torch.equal(mine, other) for other in everyone):
                raise RuntimeError(
                    f"layer {self.layer_number}: the norms of query and key heads differ between {axis} ranks"
                )

    def backward_dw(self) -> NoReturn:
        """Delayed weight gradients are not built."""
        raise NotImplementedError("delay_wgrad_compute is not built yet")


class CrossAttention(Attention):
    """Queries from hidden_states, keys and values (per head: key, then value) from key_value_states."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, "cross", cp_comm_type, model_comm_pgs)
        if config.num_query_groups != config.num_attention_heads:
            raise NotImplementedError(
                f"num_query_groups ({config.num_query_groups}) with cross attention: leave it unset there"
            )
        common: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "gather_output": False,
            "bias": config.add_bias_linear,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": self.model_comm_pgs.tp,
        }
        h, width = config.hidden_size, self.query_projection_size
        self.linear_q = build_module(submodules.linear_q, h, width, **common)  # type: ignore[arg-type]
        self.linear_kv = build_module(submodules.linear_kv, h, 2 * width, **common)  # type: ignore[arg-type]

    def encoded_bytes(self, dtype: torch.dtype) -> int:
        """That a context keeps of a token of key_value_states."""
        return 2 * self.num_attention_heads_per_partition * self.hidden_size_per_attention_head * dtype.itemsize

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        *args: Any,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention.forward`. An inference context keeps the keys and values of key_value_states, which are handed
        in with a text's first tokens only, and knows what each text may see of them: there is no mask then."""
        inference_context = inference_context if inference_context is not None else inference_params
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, key_value_states, None, *args, **kwargs)
        if attention_mask is not None:
            raise NotImplementedError("a mask of the encoder's output beside a context, which hides what it must")
        if key_value_states is not None:
            inference_context.keep_encoded(self.layer_number, *self._key_value(key_value_states))
        scale = self.core_attention.softmax_scale
        found = inference_context.attend_encoded(self.layer_number, self._query(hidden_states), scale)
        return self.linear_proj(found)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query [sq, b, a/tp, d] of hidden_states; key and value [sk, b, a/tp, d] of key_value_states."""
        if key_value_states is None:
            raise ValueError("cross attention needs key_value_states, the output of the encoder")
        return self._query(hidden_states), *self._key_value(key_value_states)

    def _query(self, hidden_states: Tensor) -> Tensor:
        query, _ = self.linear_q(hidden_states)
        return query.unflatten(-1, (self.num_attention_heads_per_partition, self.hidden_size_per_attention_head))

    def _key_value(self, key_value_states: Tensor) -> tuple[Tensor, Tensor]:
        a, d = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        mixed, _ = self.linear_kv(key_value_states)
        key, value = mixed.unflatten(-1, (a, 2 * d)).chunk(2, dim=-1)
        return key, value
