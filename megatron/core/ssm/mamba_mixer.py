"""The mixer of Mamba-2 (Dao & Gu, arXiv:2405.21060, section 7): projection, convolution, state space, gated norm.

s sequence, b microbatch, h hidden, a heads, p head width, g groups of heads that share B and C, n state width. One
tensor parallel rank has a/tp heads in g/tp groups, and all that belongs to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.extensions.mamba_kernels import kernel_scan, kernels_fit
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import ssd
from megatron.core.ssm.causal_conv import causal_conv, conv_step, last_inputs
from megatron.core.ssm.context_parallel import HeadsOfRank
from megatron.core.ssm.gated_norm import GatedRMSNorm
from megatron.core.ssm.mamba_sizes import MambaSizes
from megatron.core.ssm.sharding import sharded_parameter, split_factory
from megatron.core.tensor_parallel.initialization import cut_in_parts
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    groups_or_default,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import get_pg_size

PARTS_OF_PROJECTION = ("z", "x", "B", "C", "dt")
PARTS_OF_CONV = ("x", "B", "C")
NORM_EPS = 1e-5
CPU_CHUNK = 64
"""Longest chunk on a CPU, where the squares of longer ones leave the cache."""


@dataclass
class MambaMixerSubmodules:
    """Parts of `MambaMixer`."""

    in_proj: ModuleSpec | type | None = None
    out_proj: ModuleSpec | type | None = None


def _split_tensor_factory(
    orig_sh_ten: ShardedTensor, split_sections: list[int], split_names: list[str], split_dim: int
) -> ShardedTensorFactory:
    """The public name of `split_factory`."""
    return split_factory(orig_sh_ten, split_sections, split_names, split_dim)


class MambaMixer(MegatronModule):
    """hidden_states [s, b, h] -> [s, b, h]; sequence parallel [s/tp, b, h], gathered and scattered by the projections.

    in_proj gives z, x, B, C and dt of this rank's heads; x, B and C pass a causal convolution and SiLU, the state space
    makes y of them, y is gated by z, normalised in groups, and projected back (all-reduce, or reduce-scatter). Under
    context parallelism convolution and state space have the whole sequence for a part of the heads (all-to-all before
    and after); the rest of the work stays with the tokens. The state space computes in fp32.

    Args:
        d_model: h.
        d_conv: taps of the convolution.
        conv_init: convolution weights start uniform within this bound; None for torch's own way.
        expand: width of x over h, unless `config.mamba_num_heads` says it.
        A_init_range: decays start as -A, A uniform in it.
        D_has_hdim: D for each channel instead of each head.
        rmsnorm: normalise the gated output.
        norm_before_gate: gate it after the norm.
        dt_min, dt_max, dt_init_floor: time steps start log-uniform between the first two, at least the third.
        chunk_size: tokens of a chunk of the state space; no influence on the result.
        use_mem_eff_path: recompute inside the state space instead of storing; None for
            `config.use_mamba_mem_eff_path`.
        d_state, headdim, ngroups: instead of the configuration's.

    Raises:
        ValueError: the sizes do not fit each other or the parallel layout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 128,
        layer_number: int | None = None,
        use_mem_eff_path: bool | None = None,
        d_state: int | None = None,
        headdim: int | None = None,
        ngroups: int | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        if dt_init != "random" or dt_scale != 1.0:
            raise ValueError(f"dt_init ({dt_init!r}) and dt_scale ({dt_scale}) are of Mamba-1; leave them as they are")
        groups = groups_or_default(model_comm_pgs)
        self.model_comm_pgs, self.layer_number, self.chunk_size = groups, layer_number, chunk_size
        self.d_conv, self.D_has_hdim, self.d_model = d_conv, D_has_hdim, d_model
        self.use_mem_eff_path = config.use_mamba_mem_eff_path if use_mem_eff_path is None else use_mem_eff_path
        whole = MambaSizes.of(
            d_model,
            mamba_head_dim=headdim or config.mamba_head_dim,
            mamba_num_groups=ngroups or config.mamba_num_groups,
            mamba_state_dim=d_state or config.mamba_state_dim,
            mamba_num_heads=config.mamba_num_heads,
            expand=expand,
        )
        self.sizes = whole.over_tensor_ranks(get_pg_size(groups.tp))
        """What this rank has."""
        self.sizes.require_context_ranks(get_pg_size(groups.cp))
        self.context_parallel = HeadsOfRank(self.sizes, groups.cp)

        self.in_proj = self._input_projection(submodules.in_proj, whole, bias)
        self.conv1d = _ConvParameters(config, whole, d_conv, conv_init, conv_bias, groups)
        per_head = (whole.heads,)
        self.dt_bias = sharded_parameter(per_head, config, _initial_dt(dt_min, dt_max, dt_init_floor), groups.tp)
        fp32 = torch.float32
        self.A_log = sharded_parameter(per_head, config, _initial_log(*A_init_range), groups.tp, dtype=fp32)
        of_d = (whole.inner,) if D_has_hdim else per_head
        self.D = sharded_parameter(of_d, config, nn.init.ones_, groups.tp, dtype=fp32)
        self.norm: GatedRMSNorm | None = None
        if rmsnorm:
            own_groups, order = self.sizes.groups, norm_before_gate
            self.norm = GatedRMSNorm(
                config, whole.inner, own_groups, eps=NORM_EPS, norm_before_gate=order, tp_group=groups.tp
            )
        self.out_proj = self._output_projection(submodules.out_proj, whole, bias)

    def _input_projection(self, spec: ModuleSpec | type | None, whole: MambaSizes, bias: bool) -> nn.Module:
        projection = build_module(
            spec,  # type: ignore[arg-type]
            self.d_model,
            sum(whole.parts_of_projection),
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=self.model_comm_pgs.tp,
        )
        for param in projection.parameters():
            cut_in_parts(param, whole.parts_of_projection)
        return projection

    def _output_projection(self, spec: ModuleSpec | type | None, whole: MambaSizes, bias: bool) -> nn.Module:
        return build_module(
            spec,  # type: ignore[arg-type]
            whole.inner,
            self.d_model,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.model_comm_pgs.tp,
        )

    def forward(
        self, hidden_states: Tensor, inference_context: Any = None, *, inference_params: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """(output, bias to be added or None).

        With a static `inference_context`, the whole prompt comes in the first call and leaves its states there, and one
        token comes in each that follows. With a dynamic one, each text goes on from the states in its slot.
        """
        context = inference_context if inference_context is not None else inference_params
        if context is not None:
            if context.is_dynamic_batching():
                return self._forward_texts(hidden_states, context)
            if context.sequence_len_offset > 0:
                return self.step(hidden_states, *self._states(context, hidden_states.size(1)))[:2]
        projected, _ = self.in_proj(hidden_states)
        z, xbc, dt = self._parted(projected)
        y, states = self._mixed(xbc, dt, keep_states=context is not None)
        if context is not None and states is not None:
            for kept, state in zip(self._states(context, hidden_states.size(1), like=states), states):
                kept.copy_(state)
        return self._gated_out(y, z)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Any, ...]:
        """(output [1, b, h], bias or None, conv_state, ssm_state) of one token more; the states change in place.

        Args:
            hidden_states: [1, b, h].
            conv_state: [b, channels, taps].
            ssm_state: [b, a/tp, p, n].

        Raises:
            ValueError: several tokens are given, or ranks share the sequence.
        """
        if hidden_states.size(0) != 1 or self.context_parallel.size > 1:
            raise ValueError(
                f"a step takes one token on one context parallel rank, got {hidden_states.size(0)} on "
                f"{self.context_parallel.size}"
            )
        projected, _ = self.in_proj(hidden_states)
        z, xbc, dt = self._parted(projected)
        out, bias = self._gated_out(self._stepped(xbc[0], dt[0], conv_state, ssm_state).unsqueeze(0), z)
        return out, bias, conv_state, ssm_state

    def _stepped(self, xbc: Tensor, dt: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """y [b, inner] of one token more of each row; the states change in place."""
        mixed = conv_step(xbc, conv_state, self.conv1d.weight, self.conv1d.bias)
        x, B, C = self._wide_parts(F.silu(mixed), self.sizes)
        y = ssd.step(x, self._time_steps(dt, self.dt_bias), self._decay_rates(self.A_log), B, C, ssm_state)
        return (y + self._skip(self.D) * x).flatten(-2).to(xbc.dtype)

    def _forward_texts(self, hidden_states: Tensor, context: DynamicInferenceContext) -> tuple[Tensor, Tensor | None]:
        """(output [t, 1, h], bias or None) of texts that lie behind each other, each going on from its own states."""
        assert self.layer_number is not None
        projected, _ = self.in_proj(hidden_states)
        z, xbc, dt = self._parted(projected)
        conv, ssm = context.states(
            self.layer_number, lambda rows: self.allocate_inference_cache(rows, 0, context.params_dtype)
        )
        pieces = context.pieces()
        for state in (conv, ssm):
            state[pieces.fresh] = 0
        y = xbc.new_zeros(*xbc.shape[:2], self.sizes.inner)
        if count := len(pieces.single):
            own = conv[pieces.single], ssm[pieces.single]
            y[:count, 0] = self._stepped(xbc[:count, 0], dt[:count, 0], *own)
            conv[pieces.single], ssm[pieces.single] = own
        for begin, end, slot in pieces.several:
            row = slice(slot, slot + 1)
            y[begin:end] = self._continued(xbc[begin:end], dt[begin:end], conv[row], ssm[row])
        return self._gated_out(y, z)

    def _continued(self, xbc: Tensor, dt: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """y [s, b, inner] of several tokens more; the states change in place.

        Args:
            conv_state: [b, channels, taps], the last inputs.
            ssm_state: [b, a/tp, p, n].
        """
        seen = torch.cat((conv_state.permute(2, 0, 1).to(xbc.dtype), xbc))
        conv_state.copy_(last_inputs(seen, self.d_conv))
        mixed = causal_conv(seen, self.conv1d.weight, self.conv1d.bias)[self.d_conv :]
        x, B, C = self._wide_parts(F.silu(mixed), self.sizes)
        dt, A = self._time_steps(dt, self.dt_bias), self._decay_rates(self.A_log)
        y, final = ssd.continue_from(ssm_state, *self._scan(x, dt, A, B, C), dt, A, C)
        ssm_state.copy_(final)
        return (y + self._skip(self.D) * x).flatten(-2).to(xbc.dtype)

    def cache_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """(0, bytes that the states of a text take)."""
        conv, ssm = self.d_conv * sum(self.sizes.parts_of_conv), math.prod(self._state_shape())
        return 0, conv * dtype.itemsize + ssm * torch.float32.itemsize

    def _state_shape(self) -> tuple[int, int, int]:
        return self.sizes.heads, self.sizes.head_dim, self.sizes.state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """States before the first token: (convolution's [b, channels, taps], state space's [b, a/tp, p, n], fp32)."""
        sizes, where = self.sizes, self.conv1d.weight.device
        conv = torch.zeros(batch_size, sum(sizes.parts_of_conv), self.d_conv, device=where, dtype=dtype)
        return conv, torch.zeros(batch_size, *self._state_shape(), device=where)

    def _states(
        self, context: StaticInferenceContext, rows: int, like: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the context keeps of these rows, in the memory that it keeps it in; made `like` the states at first."""
        assert self.layer_number is not None
        memory = context.key_value_memory_dict
        if like is not None and self.layer_number not in memory:
            most = context.max_batch_size
            memory[self.layer_number] = tuple(x.new_zeros(most, *x.shape[1:]) for x in like)  # type: ignore[assignment]
        first = context.batch_size_offset
        conv, ssm = memory[self.layer_number]
        return conv[first : first + rows], ssm[first : first + rows]

    # --- pieces ---

    def _parted(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z, x with B and C, dt) of [s, b, ...]."""
        sizes = self.sizes
        z, xbc, dt = projected.split((sizes.inner, sum(sizes.parts_of_conv), sizes.heads), dim=-1)
        return z, xbc, dt

    def _mixed(self, xbc: Tensor, dt: Tensor, keep_states: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(y [s, b, inner] of this rank's tokens, the states after the last one if they are wanted)."""
        heads = self.context_parallel
        sizes = heads.sizes
        xbc, dt = heads.to_heads(xbc, dt)
        weight, bias = heads.of_channels(self.conv1d.weight), heads.of_channels(self.conv1d.bias)
        assert weight is not None
        x, B, C = self._wide_parts(F.silu(causal_conv(xbc, weight, bias)), sizes)
        dt = self._time_steps(dt, heads.of_heads(self.dt_bias))
        A, D = self._decay_rates(heads.of_heads(self.A_log)), self._skip(heads.of_heads(self.D))
        y, final = self._scan(x, dt, A, B, C)
        y = (y + D * x).flatten(-2).to(xbc.dtype)
        states = (last_inputs(xbc, self.d_conv), final) if keep_states else None
        return heads.to_tokens(y), states

    def _scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        if kernels_fit(x):
            return kernel_scan(x, dt, A, B, C, self.chunk_size)
        size = self.chunk_size if x.is_cuda else min(self.chunk_size, CPU_CHUNK)
        return ssd.chunked_scan(x, dt, A, B, C, size, recompute=self.use_mem_eff_path)

    @staticmethod
    def _wide_parts(xbc: Tensor, sizes: MambaSizes) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., a, p], B and C [..., g, n], in fp32 at least."""
        x, B, C = (_wide(part) for part in xbc.split(sizes.parts_of_conv, dim=-1))
        by_group = (sizes.groups, sizes.state)
        return x.unflatten(-1, (sizes.heads, sizes.head_dim)), B.unflatten(-1, by_group), C.unflatten(-1, by_group)

    @staticmethod
    def _time_steps(dt: Tensor, bias: Tensor) -> Tensor:
        return F.softplus(_wide(dt) + _wide(bias))

    @staticmethod
    def _decay_rates(log: Tensor) -> Tensor:
        return -torch.exp(_wide(log))

    def _skip(self, D: Tensor) -> Tensor:
        """[a, p] or [a, 1]."""
        return _wide(D).view(-1, self.sizes.head_dim if self.D_has_hdim else 1)

    def _gated_out(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return self.out_proj(y)

    # --- checkpoints ---

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """z, x, B, C and dt of the projection, and x, B and C of the convolution, under keys of their own: each of them
        is cut over the ranks, so that any number of ranks can load them."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets)
        for name, child in self.named_children():
            sharded.update(_of_child(child, f"{prefix}{name}.", sharded_offsets, metadata))
        parted: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
            ("in_proj", PARTS_OF_PROJECTION, self.sizes.parts_of_projection),
            ("conv1d", PARTS_OF_CONV, self.sizes.parts_of_conv),
        )
        for child_name, names, sections in parted:
            for key in (f"{prefix}{child_name}.weight", f"{prefix}{child_name}.bias"):
                if key in sharded:
                    sharded[key] = split_factory(sharded[key], sections, names, 0)
        return sharded


class _ConvParameters(nn.Module):
    """Weight [channels, 1, taps] and bias [channels] of this rank's x, B and C."""

    def __init__(
        self,
        config: TransformerConfig,
        whole: MambaSizes,
        taps: int,
        bound: float | None,
        has_bias: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        channels, parts = sum(whole.parts_of_conv), whole.parts_of_conv
        torchs_own = 1 / math.sqrt(taps)  # of nn.Conv1d, whose filters see so many inputs each
        init = _initial_uniform(torchs_own if bound is None else bound)
        self.weight = sharded_parameter((channels, 1, taps), config, init, groups.tp, parts=parts)
        self.bias: nn.Parameter | None = None
        if has_bias:
            self.bias = sharded_parameter((channels,), config, _initial_uniform(torchs_own), groups.tp, parts=parts)


def _of_child(child: nn.Module, prefix: str, offsets: Any, metadata: Any) -> ShardedStateDict:
    """The projections describe themselves; what convolution and norm have is cut along the first dimension."""
    if hasattr(child, "sharded_state_dict"):
        return sharded_state_dict_default(child, prefix, offsets, metadata)
    state = child.state_dict(keep_vars=True)
    return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), offsets)


def _wide(x: Tensor) -> Tensor:
    """fp32 at least: sums over a whole sequence, and exponents of them, need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- initial values: each a function that fills a tensor of any shape, element by element ---


def _elementwise(fill: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    fill.blockwise = fill.sequential = True  # type: ignore[attr-defined]
    return fill


def _initial_uniform(bound: float) -> Callable[[Tensor], Any]:
    return _elementwise(lambda tensor: nn.init.uniform_(tensor, -bound, bound))


def _initial_log(low: float, high: float) -> Callable[[Tensor], Any]:
    """log of a uniform number."""
    return _elementwise(lambda tensor: nn.init.uniform_(tensor, low, high).log_())


def _initial_dt(low: float, high: float, floor: float) -> Callable[[Tensor], Any]:
    """What softplus makes log-uniform time steps of."""

    def fill(tensor: Tensor) -> Tensor:
        steps = nn.init.uniform_(tensor, math.log(low), math.log(high)).exp_().clamp_(min=floor)
        return tensor.copy_(steps + torch.log(-torch.expm1(-steps)))

    return _elementwise(fill)
