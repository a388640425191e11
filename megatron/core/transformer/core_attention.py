"""What every attention core has in common. a heads, g query groups, d head width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.rng_tracker import forked_stream, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import get_pg_rank, get_pg_size


class CoreAttention(MegatronModule):
    """softmax(scale q kᵀ + mask) v without parameters; heads are sharded over the tensor parallel ranks.

    Args:
        layer_number: 1-based number of the layer in the model.
        attn_mask_type: what a query may see when `forward` is told nothing else.
        attention_type: "self" or "cross".
        attention_dropout: on the probabilities; None takes the configuration's.
        softmax_scale: on the scores; None is 1/sqrt(d).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.cp_group = groups_or_default(model_comm_pgs).cp
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.window_size = config.window_size
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    @property
    def dropout_p(self) -> float:
        """Dropout on the probabilities now: none outside of training."""
        return self.attention_dropout if self.training else 0.0

    @contextmanager
    def dropout_rng(self) -> Iterator[None]:
        """The random stream of sharded heads, and of the tokens or heads of this context parallel rank.

        Under sequence parallelism the whole block draws from the stream of sharded heads already.
        """
        if self.dropout_p == 0.0:
            yield
            return
        with (
            nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork(),
            forked_stream(get_pg_rank(self.cp_group)) if get_pg_size(self.cp_group) > 1 else nullcontext(),
        ):
            yield

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Context [sq, b, a/tp * d].

        Args:
            query: [sq, b, a/tp, d].
            key: [sk, b, g/tp, d].
            value: like `key`.
            attention_mask: bool, True where a key is hidden, broadcasts to [b, a, sq, sk].
            attn_mask_type: overrides the layer's.
            attention_bias: added to the scaled scores, broadcasts to [b, a, sq, sk].
            packed_seq_params: sequences on the token axis that do not see each other.
        """
        raise NotImplementedError
