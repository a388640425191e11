"""Every attention core against a brute-force fp64 reference: order, window, documents, masks, bias,
groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention_backends import CORE_OF_BACKEND, build_core_attention
from megatron.core.transformer.core_attention import CoreAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

S, B, A, D = 12, 2, 4, 8
BACKENDS = [AttnBackend.auto, AttnBackend.fused, AttnBackend.unfused]


def build(
    backend: AttnBackend, groups: int = A, mask_type: AttnMaskType = AttnMaskType.causal, **kwargs: object
) -> CoreAttention:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=A * D,
        num_attention_heads=A,
        num_query_groups=groups,
        attention_dropout=0.0,
        attention_backend=backend,
        **kwargs,
    )
    return build_core_attention(config, layer_number=3, attn_mask_type=mask_type, attention_type="self")


def tensors(groups: int = A, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (A, groups, groups)
    return [torch.randn(S, B, n, D, generator=generator).to(dtype).requires_grad_() for n in heads]


def brute_force(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """[s, b, a * d] in fp64, one query at a time; hidden [b, s, s]."""
    q, k, v = (x.double() for x in (q, k, v))
    per_group = q.size(2) // k.size(2)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.size(1)):
        for a in range(q.size(2)):
            for i in range(q.size(0)):
                seen = ~hidden[b, i]
                scores = k[seen, b, a // per_group] @ q[i, b, a] * (scale or 1 / math.sqrt(D))
                if bias is not None:
                    scores = scores + bias[b, a, i][seen].double()
                out[i, b, a] = torch.softmax(scores, -1) @ v[seen, b, a // per_group]
    return out.flatten(2)


def causal_hidden() -> Tensor:
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    return (j > i).expand(B, S, S)


def check(core: CoreAttention, groups: int, hidden: Tensor, mask: Tensor | None = None, **kwargs: object) -> None:
    inputs = tensors(groups)
    reference = [x.detach().double().requires_grad_() for x in inputs]
    expected = _differentiable(reference, hidden, kwargs.get("attention_bias"), core.softmax_scale)
    torch.testing.assert_close(
        expected.detach(),
        brute_force(*(x.detach() for x in inputs), hidden, kwargs.get("attention_bias"), core.softmax_scale),
    )
    actual = core(*inputs, mask, **kwargs)
    torch.testing.assert_close(actual, expected.float())
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    actual.backward(grad)
    expected.backward(grad.double())
    for x, wanted in zip(inputs, reference):
        torch.testing.assert_close(x.grad, wanted.grad.float())


def _differentiable(x: list[Tensor], hidden: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The same in a form that autograd can go through."""
    q, k, v = x
    k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    scores = torch.einsum("ibad,jbad->baij", q, k) * scale
    if bias is not None:
        scores = scores + bias.double()
    probs = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1)
    return torch.einsum("baij,jbad->ibad", probs, v).flatten(2)


@pytest.mark.parametrize("groups", [A, 2, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal(backend: AttnBackend, groups: int) -> None:
    check(build(backend, groups), groups, causal_hidden())


@pytest.mark.parametrize("window", [(3, 0), (0, 0), (3, -1), (100, 100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window(backend: AttnBackend, window: tuple[int, int]) -> None:
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    check(build(backend, window_size=window), A, causal_hidden() | (j < i - window[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sided_window_without_causal_order(backend: AttnBackend) -> None:
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    core = build(backend, mask_type=AttnMaskType.no_mask, window_size=(2, 4))
    check(core, A, ((j < i - 2) | (j > i + 4)).expand(B, S, S))


DOCUMENTS = [[5, 7, 12], [1, 11, 3, 3, 3, 3], [12, 12]]


def packed(lengths: list[int]) -> tuple[PackedSeqParams, Tensor]:
    """Their description, and [b, s, s], True between tokens of different documents."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(B, S)
    params = PackedSeqParams("thd", starts, starts, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    return params, owner[:, :, None] != owner[:, None, :]


@pytest.mark.parametrize("window", [None, (2, 0)])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents(backend: AttnBackend, lengths: list[int], window: tuple[int, int] | None) -> None:
    params, apart = packed(lengths)
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    outside = (j < i - window[0]) if window else torch.zeros(S, S, dtype=torch.bool)
    core = build(backend, 2, window_size=window)
    check(core, 2, causal_hidden() | apart | outside, packed_seq_params=params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_and_padding_mask_together(backend: AttnBackend) -> None:
    params, apart = packed([5, 7, 12])
    mask = torch.zeros(B, 1, 1, S, dtype=torch.bool)
    mask[:, :, :, 1] = True
    core = build(backend, mask_type=AttnMaskType.padding)
    check(core, A, apart | mask[:, 0], mask, packed_seq_params=params)


@pytest.mark.parametrize("lengths", [[5, 7], [5, 20]])
def test_documents_must_cover_the_tokens(lengths: list[int]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    with pytest.raises(ValueError, match="to the 24 tokens of the micro-batch"):
        build(AttnBackend.fused)(*tensors(), None, packed_seq_params=PackedSeqParams("thd", starts, starts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_mask_says_everything(backend: AttnBackend) -> None:
    mask = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[..., 0] = False  # every query sees something
    check(build(backend), A, mask[:, 0], mask)
    check(build(backend), A, mask[:, 0], mask, attn_mask_type=AttnMaskType.arbitrary)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_causal_adds_the_order(backend: AttnBackend) -> None:
    mask = torch.zeros(B, 1, 1, S, dtype=torch.bool)
    mask[1, :, :, 8:] = True
    core = build(backend, mask_type=AttnMaskType.padding_causal)
    check(core, A, causal_hidden() | mask[:, 0], mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias(backend: AttnBackend) -> None:
    bias = torch.randn(B, A, S, S, generator=torch.Generator().manual_seed(3))
    check(build(backend), A, causal_hidden(), attention_bias=bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fusion", [True, False])
def test_layer_scaling_and_scale_do_not_change_what_is_computed(backend: AttnBackend, fusion: bool) -> None:
    core = build(backend, apply_query_key_layer_scaling=True, masked_softmax_fusion=fusion, softmax_scale=0.3)
    check(core, A, causal_hidden())


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_queries_only(backend: AttnBackend) -> None:
    """Fewer queries than keys are the last positions, as when generating."""
    q, k, v = tensors()
    core = build(backend)
    whole = core(q, k, v, None)
    torch.testing.assert_close(core(q[-1:], k, v, None), whole[-1:])
    torch.testing.assert_close(core(q[-3:], k, v, None), whole[-3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: AttnBackend) -> None:
    inputs = tensors(2, torch.bfloat16)
    y = build(backend, 2, bf16=True, params_dtype=torch.bfloat16)(*inputs, None)
    assert y.dtype == torch.bfloat16
    expected = brute_force(*(x.detach() for x in inputs), causal_hidden())
    torch.testing.assert_close(y.double(), expected, rtol=3e-2, atol=3e-2)  # bf16 probabilities


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gets_nothing_and_asks_for_nothing(backend: AttnBackend, fusion: bool) -> None:
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    mask[0, 0, 3] = True
    core = build(backend, mask_type=AttnMaskType.padding, masked_softmax_fusion=fusion)
    inputs = tensors()
    context = core(*inputs, mask)
    assert not context[3, 0].any() and context[3, 1].all() and context[4, 0].all()
    (context[3, 0].sum() * 5).backward()
    assert not any(x.grad.any() for x in inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_no_square_matrix_on_a_cpu(dtype: torch.dtype, masked: bool) -> None:
    s, dropped = 256, []
    core = build(AttnBackend.auto, mask_type=AttnMaskType.padding if masked else AttnMaskType.causal)
    core.attention_dropout = 0.2
    q, k, v = (torch.randn(s, 1, A, D).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.zeros(1, 1, 1, s, dtype=torch.bool) if masked else None
    stored: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        stored[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    model_parallel_cuda_manual_seed(1)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            dropped.append(core(q, k, v, mask))
        assert sum(stored.values()) < A * s * s  # not a byte for each probability
        stored.clear()
    assert not torch.equal(*dropped)
    core.eval()
    torch.testing.assert_close(core(q, k, v, mask), core(q, k, v, mask), rtol=0, atol=0)


def test_backends() -> None:
    assert set(CORE_OF_BACKEND) == set(AttnBackend)
