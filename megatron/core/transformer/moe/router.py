"""The router of a mixture of experts: for each token its experts and their weights, and what keeps the load even."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import device
from megatron.core.collectives import all_reduce
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.aux_loss import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.moe.balancing import (
    RealTokens,
    balancing_losses,
    names_of_balancing_losses,
    router_z_loss,
    scores_of_all_experts,
    sequence_load_balancing_loss,
    sinkhorn,
    switch_load_balancing_loss,
)
from megatron.core.transformer.moe.routing import choose_experts, expert_capacity, limit_to_capacity, spread, wide
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import groups_or_default
from megatron.core.utils import get_pg_size

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(MegatronModule, ABC):
    """One matrix [E, h] that every rank holds; the gradients of tensor parallel ranks are parts of a sum."""

    def __init__(self, config: TransformerConfig, model_comm_pgs: ProcessGroupCollection | None = None) -> None:
        super().__init__(config)
        assert config.num_moe_experts is not None
        groups = groups_or_default(model_comm_pgs)
        self.num_experts = config.num_moe_experts
        self.sharing_group = groups.tp_cp
        """Ranks with other tokens of the same micro-batch."""
        self.replicas = groups.dp
        """Ranks with other micro-batches."""
        self.batch_group = groups.tp_dp_cp
        """Both: all ranks with a copy of this router."""
        self.layer_number: int | None = None
        self.weight = nn.Parameter(
            torch.empty(
                self.num_experts, config.hidden_size, dtype=config.params_dtype, device=parameter_device(config)
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Register how the matrix is filled."""
        config = self.config
        assert config.init_method is not None
        register_parameter_init(self.weight, config.init_method, perform_initialization=config.perform_initialization)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, E], in `moe_router_dtype` if that is set."""
        dtype = DTYPES.get(self.config.moe_router_dtype or "", input.dtype)
        return nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    @abstractmethod
    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [n, E], chosen [n, E] bool) of logits [s, b, E]."""

    @abstractmethod
    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [n, E], chosen [n, E] bool) of hidden states [s, b, h]; `padding_mask` [s, b] is True where there is
        no token."""

    def set_layer_number(self, layer_number: int) -> None:
        """Which layer (from 1) this is, for the log."""
        self.layer_number = layer_number


class TopKRouter(Router):
    """The k experts with the best scores, see `choose_experts`, balanced as `moe_router_load_balancing_type` says.

    `aux_loss`, `seq_aux_loss` and `global_aux_loss`, one or several of them, add a loss to the router, over each
    micro-batch, over each sequence, and over all micro-batches of the step so far, those of replicas included;
    `sinkhorn` chooses by a balanced assignment; with `moe_router_enable_expert_bias` a bias on the scores follows the
    load, see `update_expert_bias`. Losses and counts are of all tokens of a micro-batch whatever ranks share it, and
    leave out the places where a `padding_mask` says that there is no token.

    Communicates: all-reduce of the tokens per expert for each of these losses, over tensor × context parallel ranks,
    for `global_aux_loss` over those of all replicas; with a mask, of the numbers of tokens.
    """

    expert_bias: Tensor | None
    local_tokens_per_expert: Tensor | None
    batch_tokens_per_expert: Tensor | None
    """[E] fp32: mean over replicas, of the micro-batches of this step so far; for `global_aux_loss`."""
    batch_steps: int
    """How many micro-batches those are."""

    def __init__(self, config: TransformerConfig, model_comm_pgs: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, model_comm_pgs)
        self.topk = config.moe_router_topk
        bias = counts = None
        if config.moe_router_enable_expert_bias:
            bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device.current_device())
            counts = torch.zeros_like(bias)
        self.register_buffer("expert_bias", bias)
        self.register_buffer("local_tokens_per_expert", counts, persistent=False)
        self.losses = balancing_losses(config)
        self.names_in_log = names_of_balancing_losses(config)
        batch = None
        if "global_aux_loss" in self.losses:
            batch = torch.zeros(self.num_experts, dtype=torch.float32, device=device.current_device())
        self.register_buffer("batch_tokens_per_expert", batch, persistent=False)
        self.batch_steps = 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast and move the module, but not cast the bias and the counts: a step of the bias is lost in bf16."""
        names = ("expert_bias", "local_tokens_per_expert", "batch_tokens_per_expert")
        kept = {name: value for name in names if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.gating(self.apply_input_jitter(input))
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        return self.routing(logits, padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raises ValueError: a mask with `sinkhorn`, which assigns every row."""
        config = self.config
        tokens = RealTokens(padding_mask, logits.shape[:2], self.sharing_group)
        logits = logits.reshape(-1, self.num_experts)
        logits = self.apply_z_loss(logits, tokens)
        if config.moe_router_load_balancing_type == "sinkhorn":
            if padding_mask is not None:
                raise ValueError("padding_mask does not work with moe_router_load_balancing_type sinkhorn")
            return self.sinkhorn_load_balancing(logits)
        weights, chosen = choose_experts(
            logits,
            self.topk,
            score_function=config.moe_router_score_function,
            pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            expert_bias=self.expert_bias,
        )
        if self.local_tokens_per_expert is not None and self._counts():
            self.local_tokens_per_expert += tokens.of(chosen).sum(0)
        weights = self.apply_balancing_loss(weights, logits, tokens)
        if config.moe_expert_capacity_factor is not None:
            capacity = expert_capacity(len(logits), self.topk, self.num_experts, config.moe_expert_capacity_factor)
            padded = config.moe_pad_expert_input_to_capacity
            return limit_to_capacity(weights, chosen, capacity, config.moe_token_drop_policy, padded)
        return weights, chosen

    def _counts(self) -> bool:
        """Whether this forward is one that backward follows: recomputed layers pass here twice, once without."""
        return self.training and torch.is_grad_enabled()

    # --- losses ---

    def apply_balancing_loss(self, weights: Tensor, logits: Tensor, tokens: RealTokens) -> Tensor:
        """`weights`, whose backward also pulls the router to an even load; `logits` [n, E]."""
        if not self.losses or not self._counts():
            return weights
        scores, chosen = scores_of_all_experts(logits, self.topk, self.config.moe_router_score_function)
        scores, chosen = tokens.of(scores), tokens.of(chosen)
        for kind, coeff in self.losses.items():
            loss = self._balancing_loss(kind, scores, chosen, tokens)
            weights = self._with_loss(weights, loss, coeff, self.names_in_log[kind], tokens)
        return weights

    def _balancing_loss(self, kind: str, scores: Tensor, chosen: Tensor, tokens: RealTokens) -> Tensor:
        """This rank's part of one loss, of `scores` and `chosen` [n, E]."""
        if kind == "seq_aux_loss":
            counts = self._of_all_ranks(chosen.view(*tokens.shape, -1).sum(0))
            return sequence_load_balancing_loss(
                scores.view(*tokens.shape, -1), counts, tokens.number_in_sequences, self.topk
            )
        of_microbatch, number = chosen.sum(0), tokens.number
        if kind == "aux_loss":
            return switch_load_balancing_loss(scores, self._of_all_ranks(of_microbatch), number, self.topk)
        counts = self._of_the_batch(of_microbatch)
        if tokens.real is not None:  # micro-batches have unlike many tokens: shares of them are compared
            counts = counts.to(scores.dtype)
            counts = counts * (number * self.topk / counts.sum().clamp(min=1))
        return switch_load_balancing_loss(scores, counts, number, self.topk)

    def apply_z_loss(self, logits: Tensor, tokens: RealTokens) -> Tensor:
        """`logits` [n, E], whose backward also keeps them small."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not self._counts():
            return logits
        real = logits if tokens.real is None else logits[tokens.real]
        return self._with_loss(logits, router_z_loss(real, tokens.number), coeff, "z_loss", tokens)

    def _of_all_ranks(self, counts: Tensor) -> Tensor:
        if get_pg_size(self.sharing_group) > 1:
            all_reduce(counts, group=self.sharing_group, what="tokens per expert")
        return counts

    def _of_the_batch(self, counts: Tensor) -> Tensor:
        """Mean over the micro-batches of all replicas so far; `counts` [E] are this rank's of the present one."""
        assert self.batch_tokens_per_expert is not None
        if get_pg_size(self.batch_group) > 1:
            all_reduce(counts, group=self.batch_group, what="tokens per expert")
        self.batch_tokens_per_expert += counts / get_pg_size(self.replicas)
        self.batch_steps += 1
        return self.batch_tokens_per_expert / self.batch_steps

    def begin_batch(self) -> None:
        """Forget the tokens of the step that has ended."""
        if self.batch_tokens_per_expert is not None:
            self.batch_tokens_per_expert.zero_()
        self.batch_steps = 0

    def _with_loss(self, x: Tensor, loss: Tensor, coeff: float, name: str, tokens: RealTokens) -> Tensor:
        """`x` with this rank's part of a loss of the micro-batch attached, and noted for the log."""
        if self.layer_number is not None:
            total = self.config.num_layers + (self.config.mtp_num_layers or 0)
            save_to_aux_losses_tracker(name, loss, self.layer_number, total, self.sharing_group, self.replicas)
        weight: float | Tensor = coeff
        if self.config.calculate_per_token_loss:  # the sum over all micro-batches is divided by all tokens
            weight = coeff * tokens.number
        return MoEAuxLossAutoScaler.apply(x, loss * weight)

    def sinkhorn_load_balancing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts by a balanced assignment of this rank's tokens while training; weights of the logits as they are."""
        scores = wide(logits)
        with torch.no_grad():
            indices = torch.topk(sinkhorn(scores) if self.training else scores, self.topk, dim=1).indices
        weights = torch.sigmoid(scores) if self.topk == 1 else torch.softmax(scores, dim=-1)
        return spread(weights.gather(1, indices), indices, self.num_experts)

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """`input` times noise from [1 - eps, 1 + eps], while training."""
        eps = self.config.moe_input_jitter_eps
        if eps is None or not self.training:
            return input
        return input * torch.empty_like(input).uniform_(1 - eps, 1 + eps)


class _RandomLogits(torch.autograd.Function):
    """Random logits in place of those given, which get the gradient: an even load, for benchmarks."""

    @staticmethod
    def forward(ctx: object, logits: Tensor) -> Tensor:
        return torch.randn_like(logits)

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> Tensor:
        return grad_output


def apply_random_logits(logits: Tensor) -> Tensor:
    """Random values of the shape of `logits`, to which the gradient passes unchanged."""
    return _RandomLogits.apply(logits)


@torch.no_grad()
def update_expert_bias(routers: list[TopKRouter], groups: ProcessGroupCollection) -> None:
    """Raise the bias of experts that got fewer tokens than the mean since the last update, lower that of others.

    bias += rate * sign(mean - count) (arXiv:2408.15664, section 3). Communicates: one all-reduce of the counts over
    all ranks that hold copies of the routers (tensor × data × context parallel).
    """
    if not routers:
        return
    held = [router.local_tokens_per_expert for router in routers]
    counts = torch.stack([count for count in held if count is not None])
    if get_pg_size(groups.tp_dp_cp) > 1:
        all_reduce(counts, group=groups.tp_dp_cp, what="tokens per expert")
    for router, count in zip(routers, counts):
        assert router.expert_bias is not None and router.local_tokens_per_expert is not None
        router.expert_bias += router.config.moe_router_bias_update_rate * torch.sign(count.mean() - count)
        router.local_tokens_per_expert.zero_()
