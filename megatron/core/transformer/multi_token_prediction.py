"""Modules behind the decoder that predict tokens further ahead while training (DeepSeek-V3, arXiv:2412.19437,
section 2.2).

s sequence, b microbatch, h hidden; D modules, of which the k-th (from 1) predicts the token k behind the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import all_gather_into_tensor, all_reduce
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fp8.attach import compute_in_fp8
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import (
    ProcessGroupCollection,
    default_process_groups,
    has_default_process_groups,
)
from megatron.core.tensor_parallel.mappings import gather_features
from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.aux_loss import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import draws_for_tokens, groups_or_default
from megatron.core.utils import get_batch_on_this_cp_rank, get_pg_rank, get_pg_size


@dataclass
class MultiTokenPredictionLayerSubmodules:
    """Parts of `MultiTokenPredictionLayer`."""

    enorm: ModuleSpec | type | None = None
    hnorm: ModuleSpec | type | None = None
    eh_proj: ModuleSpec | type | None = None
    transformer_layer: ModuleSpec | type | None = None
    layer_norm: ModuleSpec | type | None = None


@dataclass
class MultiTokenPredictionBlockSubmodules:
    """Parts of `MultiTokenPredictionBlock`: its modules, in order."""

    layer_specs: list[ModuleSpec] | None = None


class MTPLossAutoScaler(MoEAuxLossAutoScaler):
    """x as it is; backward adds the gradient of a loss of further tokens, scaled like the model's own."""


# --- shifting --------------------------------------------------------------------------------------------


def roll_tensor(tensor: Tensor, shifts: int = -1, dims: int = -1) -> tuple[Tensor, Tensor]:
    """(`tensor` with each entry `-shifts` places earlier along `dims` and zeros at the end, its sum).

    Raises:
        ValueError: `shifts` does not point to the left.
    """
    if shifts >= 0:
        raise ValueError(f"roll_tensor(shifts={shifts}): entries move to earlier places, with a negative number")
    rolled = torch.roll(tensor, shifts=shifts, dims=dims)
    rolled.narrow(dims, tensor.size(dims) + shifts, -shifts).fill_(0)
    return rolled, rolled.sum()


def of_next_tokens(x: Tensor, ends: Tensor | None = None, cp_group: ProcessGroup | None = None) -> Tensor:
    """[b, s/cp]: for each token of this rank what `x` [b, s/cp] says of the token behind it; 0 where there is none.

    Communicates: all-gather of the first entry of each chunk over the context parallel group, whose ranks hold two
    chunks of each sample, c and 2 cp - 1 - c.

    Args:
        ends: bool [b, s/cp], tokens that are the last ones of a document, behind which another begins.
    """
    size, rank = get_pg_size(cp_group), get_pg_rank(cp_group)
    shifted = torch.roll(x, -1, dims=1)
    behind = torch.zeros_like(x[:, :1])
    if size == 1:
        shifted[:, -1:] = behind
    else:
        half = x.size(1) // 2
        firsts = x[:, ::half].contiguous()  # [b, 2]
        of_all = firsts.new_empty(size * len(firsts), 2)
        all_gather_into_tensor(of_all, firsts, group=cp_group, what="first tokens of chunks")
        of_all = of_all.view(size, -1, 2)
        chunks = torch.cat((of_all[:, :, 0], of_all[:, :, 1].flip(0), behind.t()))  # [2 cp + 1, b]
        shifted[:, half - 1] = chunks[rank + 1]
        shifted[:, -1] = chunks[2 * size - rank]
    return shifted if ends is None else shifted.masked_fill(ends, 0)


def ends_of_documents(
    packed: PackedSeqParams | None, like: Tensor, cp_group: ProcessGroup | None = None
) -> Tensor | None:
    """bool, of the shape of `like` [b, s/cp]: where a packed sequence ends; None without packed sequences.

    Raises:
        NotImplementedError: context parallel ranks have parts of each packed sequence.
    """
    if packed is None:
        return None
    size = get_pg_size(cp_group)
    if size > 1 and not packed.is_cut_by_sample:
        raise NotImplementedError("further tokens of packed sequences that are each cut over context parallel ranks")
    borders = packed.document_starts().to(like.device, torch.int64)
    ends = torch.zeros(like.size(0) * like.size(1) * size, dtype=torch.bool, device=like.device)
    ends[borders[1:] - 1] = True
    return get_batch_on_this_cp_rank({"ends": ends.view(like.size(0), -1)}, cp_group)["ends"]


# --- one module ------------------------------------------------------------------------------------------


class MultiTokenPredictionLayer(MegatronModule):
    """norm(transformer layer(M [norm(embedding of a later token); norm(hidden state)])).

    hidden_states [s, b, h] and the embedding likewise -> [s, b, h]; sequence parallel [s/tp, b, h]. M is cut by rows
    over the tensor parallel ranks and its result gathered, sequence parallel exchanged.

    Args:
        layer_number: 1-based number of the module; its transformer layer counts on from the decoder's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        layer_number: int = 1,
        vp_stage: int | None = None,
        *,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        groups = groups_or_default(model_comm_pgs)
        self.layer_number, self.tp_group = layer_number, groups.tp
        self.enorm, self.hnorm = self._norm(submodules.enorm), self._norm(submodules.hnorm)
        self.eh_proj = build_module(
            submodules.eh_proj,  # type: ignore[arg-type]
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=groups.tp,
        )
        before = get_transformer_layer_offset(config, vp_stage, groups.pp)
        self.transformer_layer = build_module(
            submodules.transformer_layer,  # type: ignore[arg-type]
            config=config,
            layer_number=config.num_layers + layer_number - before,
            model_comm_pgs=groups,
            vp_stage=vp_stage,
        )
        self.final_layernorm = self._norm(submodules.layer_norm)

    def _norm(self, spec: ModuleSpec | type | None) -> nn.Module:
        config = self.config
        return build_module(spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)  # type: ignore[arg-type]

    def forward(
        self,
        decoder_input: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Normed hidden states [s, b, h]; arguments as of `TransformerLayer.forward`, and:

        Args:
            decoder_input: embeddings of the tokens k places on.
            hidden_states: of the decoder's end, or of the module before.
        """
        others = {
            "attention_mask": attention_mask,
            "context_mask": context_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "rotary_pos_cos": rotary_pos_cos,
            "rotary_pos_sin": rotary_pos_sin,
            "inference_params": inference_params,
            "packed_seq_params": packed_seq_params,
            "sequence_len_offset": sequence_len_offset,
            **({} if padding_mask is None else {"padding_mask": padding_mask}),
        }

        def run(embedded: Tensor, hidden: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
            both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
            joined = gather_features(self.eh_proj(both)[0], self.config.sequence_parallel, self.tp_group)
            with self._dropout_rng():
                output, _ = self.transformer_layer(joined, context=context, attention_bias=bias, **others)
            return self.final_layernorm(output)

        if self.config.recompute_granularity == "full" and self.training:
            return checkpoint(run, False, decoder_input, hidden_states, context, attention_bias)
        return run(decoder_input, hidden_states, context, attention_bias)

    def _dropout_rng(self) -> contextlib.AbstractContextManager[None]:
        """As in `TransformerBlock`: sequence parallel ranks have other tokens."""
        draws = self.training and draws_for_tokens(self.config)
        return get_cuda_rng_tracker().fork() if self.config.sequence_parallel and draws else contextlib.nullcontext()


# --- all of them -----------------------------------------------------------------------------------------


class MultiTokenPredictionBlock(MegatronModule):
    """The modules of the last stage, each fed by the one before, and their losses.

    The loss of module k is the mean of its tokens' losses, times `mtp_loss_scaling_factor` / D. A token counts if it
    counts for the next-token loss k places later, in the same document; with `calculate_per_token_loss` the sum of the
    losses is divided, as that of the next tokens, by the number of tokens that count for those.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: MultiTokenPredictionBlockSubmodules,
        vp_stage: int | None = None,
        *,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.model_comm_pgs = groups_or_default(model_comm_pgs)
        factor = config.mtp_loss_scaling_factor
        self.mtp_loss_scaling_factor = 0.1 if factor is None else factor
        self.layers = nn.ModuleList(
            build_module(
                layer_spec,
                config=config,
                layer_number=number,
                vp_stage=vp_stage,
                model_comm_pgs=self.model_comm_pgs,
            )
            for number, layer_spec in enumerate(spec.layer_specs or (), start=1)
        )
        compute_in_fp8(self.layers, config, None, self.model_comm_pgs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
        loss_mask: Tensor | None = None,
        embedding: Callable[..., Tensor] | None = None,
        output_layer: Callable[..., Any] | None = None,
        output_weight: Tensor | None = None,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        loss_of_hidden_states: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """`hidden_states` [s, b, h] as they are, whose backward also trains the modules.

        Args:
            input_ids, labels: [b, s/cp] of the next-token loss, which the modules shift.
            loss_mask: [b, s/cp], which tokens count there; None: all.
            embedding, output_layer, output_weight, compute_language_model_loss: the model's own.
            loss_of_hidden_states: of (labels, hidden states, weight of the output layer, whether to gather its result);
                None: output layer, then loss.

        Raises:
            ValueError: one of them, or the labels, are missing.
        """
        if labels is None or embedding is None or output_layer is None or compute_language_model_loss is None:
            raise ValueError("further tokens need labels, and the model's embedding, output layer and loss")
        cp_group = self.model_comm_pgs.cp
        ends = ends_of_documents(packed_seq_params, input_ids, cp_group)
        mask = torch.ones(labels.shape, device=labels.device) if loss_mask is None else loss_mask.float()
        main, hidden = hidden_states, hidden_states
        for layer in self.layers:
            input_ids, labels, mask = (of_next_tokens(x, ends, cp_group) for x in (input_ids, labels, mask))
            hidden = layer(
                decoder_input=embedding(input_ids=input_ids, position_ids=position_ids),
                hidden_states=hidden,
                attention_mask=attention_mask,
                context=context,
                context_mask=context_mask,
                rotary_pos_emb=rotary_pos_emb,
                rotary_pos_cos=rotary_pos_cos,
                rotary_pos_sin=rotary_pos_sin,
                attention_bias=attention_bias,
                inference_params=inference_params,
                packed_seq_params=packed_seq_params,
                sequence_len_offset=sequence_len_offset,
                **(extra_block_kwargs or {}),
            )
            if loss_of_hidden_states is None:
                logits, _ = output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
                losses = compute_language_model_loss(labels, logits)
            else:
                losses = loss_of_hidden_states(labels, hidden, output_weight, runtime_gather_output)
            loss = (losses * mask).sum()
            main = self._with_loss(main, loss, mask.sum(), layer.layer_number)  # type: ignore[arg-type]
        return main

    def _with_loss(self, hidden_states: Tensor, loss: Tensor, num_tokens: Tensor, number: int) -> Tensor:
        """`hidden_states` with a module's loss attached, and noted for the log.

        Communicates: all-reduce of the number of tokens over context parallel ranks, unless gradients are divided by
        all tokens at the end.
        """
        MTPLossLoggingHelper.save_sum_to_tracker(loss, num_tokens, number, len(self.layers))
        weight = self.mtp_loss_scaling_factor / len(self.layers)
        if not self.config.calculate_per_token_loss:
            if get_pg_size(self.model_comm_pgs.cp) > 1:
                num_tokens = num_tokens.clone()
                all_reduce(num_tokens, group=self.model_comm_pgs.cp, what="token counts")
            loss = loss / num_tokens.clamp(min=1)
        return MTPLossAutoScaler.apply(hidden_states, loss * weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Each module's parameters under its number."""
        sharded: ShardedStateDict = {}
        for i, layer in enumerate(self.layers):
            sharded.update(layer.sharded_state_dict(f"{prefix}layers.{i}.", sharded_offsets, metadata))  # type: ignore[operator]
        return sharded


class MTPLossLoggingHelper:
    """Sums of the modules' losses, and their tokens, since the last time that they were read."""

    sums: Tensor | None = None
    """fp32 [D, 2] on every stage."""

    @classmethod
    def save_sum_to_tracker(cls, loss: Tensor, num_tokens: Tensor, layer_number: int, num_layers: int) -> None:
        """Add a microbatch's losses of module `layer_number` (from 1)."""
        cls.track(num_layers)
        assert cls.sums is not None
        if torch.is_grad_enabled():
            cls.sums[layer_number - 1] += torch.stack([loss.detach().float(), num_tokens.float()])

    @classmethod
    def track(cls, num_layers: int) -> None:
        """Have sums, on stages without such modules too: all take part in reading them."""
        if cls.sums is None or len(cls.sums) != num_layers:
            cls.sums = torch.zeros(num_layers, 2, device=device.current_device())

    @classmethod
    def mean_losses(cls, num_layers: int) -> list[float]:
        """Each module's mean loss over all tokens of a step, on every rank; then start anew. Communicates: all-reduce
        over data, context and pipeline parallel ranks."""
        cls.track(num_layers)
        assert cls.sums is not None
        groups = default_process_groups() if has_default_process_groups() else None
        for group in (groups.dp_cp, groups.pp) if groups is not None else ():
            if get_pg_size(group) > 1:
                all_reduce(cls.sums, group=group, what="losses of further tokens")
        means = (cls.sums[:, 0] / cls.sums[:, 1].clamp(min=1)).tolist()
        cls.sums = None
        return means
