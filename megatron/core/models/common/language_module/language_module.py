"""What every language model shares: the loss, and the tie between embedding and output layer.

s sequence, b microbatch, v vocabulary.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.fusions.linear_cross_entropy import linear_cross_entropy
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import get_pg_rank, make_tp_sharded_tensor_for_checkpoint
from megatron.core.vocabulary_padding import mark_padding_rows

_LOCAL_EXPERT = re.compile(r"((?:transformer_layer\.)?mlp\.experts\.local_experts\.)(\d+)(\..*)")


class LanguageModule(MegatronModule):
    """Base of language models.

    Subclasses have `pre_process`, `post_process`, `share_embeddings_and_output_weights` and, where they
    apply, `embedding` and `output_layer` (not those that predict no tokens).
    """

    vocab_size: int
    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    true_vocab_size: int | None = None
    position_embedding_type: str
    mtp_process: bool = False
    """This chunk predicts further tokens, and embeds some for that."""
    output_layer_name: str = "output_layer"
    """Where in the model the output layer is."""

    def __init__(self, config: TransformerConfig, model_comm_pgs: ProcessGroupCollection | None = None) -> None:
        super().__init__(config)
        self.model_comm_pgs = groups_or_default(model_comm_pgs)

    def plain_rotary_embedding(
        self, percent: float, interpolation: float | None, base: float
    ) -> RotaryEmbedding | None:
        """Where the angles of rotary positions come from, None for other positions.

        Args:
            percent: share of each head that is rotated.
            interpolation: positions are divided by this.
        """
        if self.position_embedding_type != "rope":
            return None
        assert self.config.kv_channels is not None
        return RotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=percent,
            rotary_interleaved=self.config.rotary_interleaved,
            seq_len_interpolation_factor=interpolation,
            rotary_base=base,
            cp_group=self.model_comm_pgs.cp,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of each token, [b, s] fp32, equal on all tensor parallel ranks.

        Args:
            labels: [b, s].
            logits: [s, b, v/tp].
        """
        labels = labels.transpose(0, 1).contiguous()
        tp_group = self.model_comm_pgs.tp
        if self.config.cross_entropy_loss_fusion:
            loss = fused_vocab_parallel_cross_entropy(logits, labels, tp_group, vocab_size=self.true_vocab_size)
        else:
            loss = vocab_parallel_cross_entropy(logits, labels, tp_group=tp_group, vocab_size=self.true_vocab_size)
        return loss.transpose(0, 1).contiguous()

    def loss_of_hidden_states(
        self,
        labels: Tensor,
        hidden_states: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Cross entropy of each token, [b, s] fp32, of what the output layer makes of the hidden states.

        Args:
            labels: [b, s].
            hidden_states: [s, b, h], sequence parallel [s/tp, b, h].
            weight: of the output layer, where it is the embedding's.
        """
        output_layer: Any = self.output_layer
        if not (self.config.cross_entropy_loss_fusion and self.config.cross_entropy_fusion_impl == "linear"):
            logits, _ = output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
            return self.compute_language_model_loss(labels, logits)
        loss = linear_cross_entropy(
            hidden_states,
            output_layer.weight if weight is None else weight,
            labels.transpose(0, 1).contiguous(),
            self.model_comm_pgs.tp,
            self.true_vocab_size,
            output_layer.sequence_parallel,
            self.config.gradient_accumulation_fusion,
        )
        return loss.transpose(0, 1).contiguous()

    def global_parameter_name(self, local_name: str) -> str:
        """Name of a parameter in the whole model: its layer counted from the first stage, a tied copy's original,
        its experts counted over all ranks."""
        if local_name == f"{self.output_layer_name}.weight" and self.share_embeddings_and_output_weights:
            return "embedding.word_embeddings.weight"
        block, found, rest = local_name.partition(".layers.")
        if not found or "." in block:
            return local_name
        index, _, name = rest.partition(".")
        layer = getattr(self, block).layers[int(index)]
        expert = _LOCAL_EXPERT.match(name)
        if expert is not None:
            of_mlp = getattr(layer, "transformer_layer", layer)
            name = f"{expert[1]}{of_mlp.mlp.local_expert_indices[int(expert[2])]}{expert[3]}"
        return f"{block}.layers.{layer.layer_number - 1}.{name}"

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark embedding and output weights, and, of a tied pair on two stages, that it is one tensor.

        The last stage's copy starts with the same values because both are initialised under the embedding's
        name; in training their gradients are summed over the embedding group (arXiv:1909.08053, section 3;
        parallel over stages).
        """
        embeds = self.pre_process or self.mtp_process
        tables: list[Any] = [self.embedding.word_embeddings.weight] if embeds else []  # type: ignore[union-attr]
        output_layer: Any = getattr(self, "output_layer", None)
        tables += [output_layer.weight] if output_layer is not None else []
        for table in tables:
            if table is not None:
                table.is_embedding_or_output_parameter = True
                mark_padding_rows(table, get_pg_rank(self.model_comm_pgs.tp) * table.size(0), self.true_vocab_size)
        if not self.both_ends_embed() or (self.pre_process and self.post_process):
            return
        weight: Any = self.shared_embedding_or_output_weight()
        if weight is not None:
            weight.shared_embedding = True
            weight.shared = not self.pre_process  # counted once in norms, on the first stage

    def both_ends_embed(self) -> bool:
        """Whether the last stage uses the embedding, for its output or to predict further tokens."""
        return self.share_embeddings_and_output_weights or bool(self.config.mtp_num_layers)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding [v/tp, h] where this stage holds it or what is tied to it, else None."""
        if self.pre_process or self.mtp_process:
            return self.embedding.word_embeddings.weight  # type: ignore[union-attr, return-value]
        if self.post_process:
            return self.output_layer.weight  # type: ignore[union-attr, return-value]
        return None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As of the parts; the tied output weight points at the embedding, and padded rows may differ in
        number.

        Raises:
            ValueError: `sharded_offsets` is not empty.
        """
        if sharded_offsets:
            raise ValueError(f"a language model cannot be stacked along further axes {sharded_offsets}")
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        embedding_key = f"{prefix}embedding.word_embeddings.weight"
        output_layer = f"{prefix}{self.output_layer_name}"
        output_key = f"{output_layer}.weight"
        sharded.pop(f"{output_layer}._extra_state", None)
        if self.share_embeddings_and_output_weights:
            self.tie_embeddings_and_output_weights_state_dict(sharded, output_key, embedding_key)
        if self.mtp_process and not self.pre_process:
            sharded[embedding_key] = self._further_copy(embedding_key)
        for key in (embedding_key, output_key, f"{output_layer}.bias"):
            if key in sharded:
                sharded[key].allow_shape_mismatch = True
        return sharded

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: ShardedStateDict,
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
    ) -> None:
        """Describe a tied output weight as a further copy of the embedding; changes `sharded_state_dict`."""
        sharded_state_dict.pop(output_layer_weight_key, None)
        if self.pre_process or self.mtp_process or not self.post_process:
            return
        sharded_state_dict[output_layer_weight_key] = self._further_copy(first_stage_word_emb_key)

    def _further_copy(self, embedding_key: str) -> ShardedTensor:
        """This stage's copy of the first stage's embedding."""
        weight = self.shared_embedding_or_output_weight()
        assert isinstance(weight, torch.Tensor)
        return make_tp_sharded_tensor_for_checkpoint(
            weight,
            embedding_key,
            replica_id=(1, 0, get_pg_rank(self.model_comm_pgs.dp_cp)),
            allow_shape_mismatch=True,
        )
