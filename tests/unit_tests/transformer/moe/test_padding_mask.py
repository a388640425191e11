"""Places without a token: experts' loads and the losses on them are those of the tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel import set_initialization_seed
from megatron.core.transformer.moe.aux_loss import clear_aux_losses_tracker
from megatron.core.transformer.moe.balancing import scores_of_all_experts
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

S, B, H, E, K = 8, 3, 8, 4, 2
COEFFS = {"aux_loss": 0.5, "seq_aux_loss": 0.25, "global_aux_loss": 2.0}
Z = 0.3


def router_of(**options: Any) -> TopKRouter:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=E,
        moe_ffn_hidden_size=8,
        moe_router_load_balancing_type=list(COEFFS),
        moe_aux_loss_coeff=list(COEFFS.values()),
        moe_z_loss_coeff=Z,
        params_dtype=torch.float64,
        **options,
    )
    router = TopKRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return router


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """(hidden states [S, B, H], padding [S, B]): sequences of unlike lengths, in the second one without a token."""
    chance = torch.Generator().manual_seed(2)
    states = [torch.randn(S, B, H, generator=chance, dtype=torch.float64) for _ in range(2)]
    lengths = torch.tensor([[8, 5, 2], [3, 0, 7]])
    return [(x, torch.arange(S)[:, None] >= length) for x, length in zip(states, lengths)]


def expected_gradients() -> list[Tensor]:
    """Of the router, from each micro-batch's losses written out over its tokens alone."""
    router, gradients, seen = router_of(), [], torch.zeros(E, dtype=torch.float64)
    for x, padding in micro_batches():
        real = ~padding
        logits = x @ router.weight.t()
        scores, chosen = scores_of_all_experts(logits[real], K, "softmax")
        total = len(scores)
        counts = chosen.sum(0).double()
        seen = seen + counts
        losses = {
            "aux_loss": E * (scores.mean(0) * counts / (total * K)).sum(),
            "global_aux_loss": E * (scores.mean(0) * seen / seen.sum()).sum(),
            "seq_aux_loss": torch.zeros((), dtype=torch.float64),
        }
        for b in range(B):
            if real[:, b].any():
                own, its = scores_of_all_experts(logits[real[:, b], b], K, "softmax")
                losses["seq_aux_loss"] += E * (own.mean(0) * its.sum(0) / (len(own) * K)).sum() / B
        z = torch.logsumexp(logits[real], dim=-1).square().mean()
        loss = sum(COEFFS[kind] * value for kind, value in losses.items()) + Z * z
        gradients.append(torch.autograd.grad(loss, router.weight)[0])
    return gradients


def test_losses_are_those_of_the_tokens() -> None:
    router, expected = router_of(), expected_gradients()
    for (x, padding), wanted in zip(micro_batches(), expected):
        weights, _ = router(x, padding)
        (found,) = torch.autograd.grad(0 * weights.sum(), router.weight)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    clear_aux_losses_tracker()


def test_the_bias_follows_the_tokens() -> None:
    router = router_of(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    x, padding = micro_batches()[0]
    _, chosen = router(x, padding)
    assert router.local_tokens_per_expert is not None
    assert router.local_tokens_per_expert.tolist() == chosen[~padding.reshape(-1)].sum(0).tolist()
    clear_aux_losses_tracker()


def check_parts_of_sequences() -> None:
    from megatron.core import parallel_state

    rank = torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    router = router_of(tensor_model_parallel_size=2, sequence_parallel=True)
    part = slice(rank * S // 2, (rank + 1) * S // 2)
    for (x, padding), wanted in zip(micro_batches(), expected_gradients()):
        weights, _ = router(x[part], padding[part])
        (found,) = torch.autograd.grad(0 * weights.sum(), router.weight)
        torch.distributed.all_reduce(found)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    clear_aux_losses_tracker()
    parallel_state.destroy_model_parallel()


def test_parts_of_sequences_on_two_ranks() -> None:
    run_ranks(2, check_parts_of_sequences)


def test_what_a_mask_cannot_be() -> None:
    x, padding = micro_batches()[0]
    with pytest.raises(ValueError, match=r"padding_mask has shape \(3, 8\), hidden states have \(8, 3\)"):
        router_of()(x, padding.t())


# --- handed down by the model ----------------------------------------------------------------------------

VOCAB = 16


def model_of(**options: Any) -> GPTModel:
    """Two layers of experts, and one more that predicts a further token."""
    set_initialization_seed(4)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=H,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=E,
        moe_ffn_hidden_size=8,
        moe_router_load_balancing_type=list(COEFFS),
        moe_aux_loss_coeff=list(COEFFS.values()),
        moe_z_loss_coeff=Z,
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        mtp_num_layers=1,
        params_dtype=torch.float64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )
    layer = get_gpt_layer_local_spec(num_experts=E)
    further = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
    return GPTModel(config, layer, VOCAB, S, position_embedding_type="rope", mtp_block_spec=further)


def texts(filler: int) -> tuple[Tensor, Tensor]:
    """(tokens [B, S], where there are none): texts of unlike lengths, an end, which the last token looks ahead to, and
    `filler`."""
    ids = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([[8], [5], [2]])
    padding = torch.arange(S) >= lengths
    return ids.masked_fill(padding, filler).masked_fill(torch.arange(S) == lengths, 1), padding


def learned(model: GPTModel, filler: int, *, masked: bool = True) -> tuple[list[Tensor], list[float]]:
    """(gradient of each router, summed over ranks; tokens that each counted for all its experts)."""
    ids, padding = texts(filler)
    labels, real = ids.roll(-1, 1), (~padding).double()
    positions = torch.arange(S).expand(B, -1)
    mask = padding if masked else None
    losses = model(ids, positions, None, labels=labels, loss_mask=real, padding_mask=mask)
    (losses * 0).sum().backward()
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    gradients = [router.weight.grad for router in routers]
    if torch.distributed.is_initialized():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
    counts = [float(router.local_tokens_per_expert.sum()) for router in routers]  # type: ignore[union-attr]
    clear_aux_losses_tracker()
    MTPLossLoggingHelper.sums = None
    return gradients, counts  # type: ignore[return-value]


RECOMPUTED = {
    "stored": {},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "layers": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_a_model_hands_the_mask_to_its_layers(recomputed: str) -> None:
    """What stands where there is no token changes nothing that routers learn; without a mask it does."""
    options = RECOMPUTED[recomputed]
    (first, counts), (second, _) = (learned(model_of(**options), filler) for filler in (0, 7))
    assert counts == [15 * K] * 3  # two layers and the further one
    for found, other in zip(first, second):
        assert found.abs().sum() > 0
        torch.testing.assert_close(found, other)
    (first, counts), (second, _) = (learned(model_of(**options), filler, masked=False) for filler in (0, 7))
    assert counts == [B * S * K] * 3
    assert not any(torch.allclose(found, other) for found, other in zip(first, second))


def check_model_on_two_ranks() -> list[Tensor]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    return learned(model_of(tensor_model_parallel_size=2, sequence_parallel=True), 0)[0]


def test_a_model_on_two_ranks_learns_the_same() -> None:
    expected, _ = learned(model_of(), 0)
    for found, wanted in zip(run_ranks(2, check_model_on_two_ranks)[0], expected):
        torch.testing.assert_close(found, wanted)
