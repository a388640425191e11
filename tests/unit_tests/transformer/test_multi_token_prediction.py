"""Modules for further tokens against their loss written out, in one process and over all ways to spread it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import set_initialization_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    ends_of_documents,
    of_next_tokens,
    roll_tensor,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from tests.worker_pool import run_ranks

S, B, H, VOCAB, DEPTH, FACTOR = 8, 2, 16, 24, 2, 0.3


def model(**options: Any) -> GPTModel:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": H,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "params_dtype": torch.float64,
        "init_method_std": 0.3,
        "mtp_num_layers": DEPTH,
        "mtp_loss_scaling_factor": FACTOR,
        "gradient_accumulation_fusion": False,
        "attention_backend": AttnBackend.unfused,
        "attention_softmax_in_fp32": False,
    }
    config = TransformerConfig(**values | options)
    spec = get_gpt_layer_local_spec()
    set_initialization_seed(3)
    return GPTModel(
        config,
        spec,
        VOCAB,
        S,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, labels, mask, positions); tokens count unevenly."""
    drawn = torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(B, S)
    mask[0, 3:6] = 0
    mask[1, 1] = 0
    return drawn[:, :-1], drawn[:, 1:], mask, torch.arange(S).expand(B, S)


def written_out(made: GPTModel, per_token: bool) -> tuple[Tensor, list[Tensor]]:
    """(the whole loss of a microbatch, mean loss of each module), sample by sample and token by token."""
    tokens, labels, mask, positions = batch()
    angles = made.rotary_pos_emb(S)
    hidden = made.decoder(made.embedding(tokens, positions), None, rotary_pos_emb=angles)

    def log_probs(states: Tensor) -> Tensor:
        return (states @ made.output_layer.weight.t()).log_softmax(-1)  # [s, b, v]

    def counted(states: Tensor, ahead: int) -> tuple[Tensor, float]:
        of_words, total, count = log_probs(states), torch.zeros((), dtype=torch.float64), 0.0
        for sample in range(B):
            for place in range(S - ahead):
                weight = float(mask[sample, place + ahead])
                total = total - weight * of_words[place, sample, labels[sample, place + ahead]]
                count += weight
        return total, count

    total, tokens_that_count = counted(hidden, 0)
    whole = total / (1 if per_token else tokens_that_count)
    means = []
    for k, layer in enumerate(made.mtp.layers, 1):
        later = torch.zeros_like(tokens)
        later[:, : S - k] = tokens[:, k:]
        joined = torch.cat((layer.enorm(made.embedding(later, positions)), layer.hnorm(hidden)), -1)
        joined = joined @ layer.eh_proj.weight.t()
        hidden = layer.final_layernorm(layer.transformer_layer(joined, rotary_pos_emb=angles)[0])
        total, count = counted(hidden, k)
        whole = whole + FACTOR / DEPTH * total / (1 if per_token else count)
        means.append(total.detach() / count)
    return whole, means


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_written_out(per_token: bool, recompute: bool) -> None:
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    made = model(calculate_per_token_loss=per_token, **(whole if recompute else {}))
    expected, means = written_out(made, per_token)
    expected.backward()
    wanted = {name: param.grad.clone() for name, param in made.named_parameters()}  # type: ignore[union-attr]
    made.zero_grad()
    tokens, labels, mask, positions = batch()
    MTPLossAutoScaler.set_loss_scale(1.0)
    MTPLossLoggingHelper.sums = None
    losses = made(tokens, positions, None, labels=labels, loss_mask=mask)
    main = (losses * mask).sum()
    (main if per_token else main / mask.sum()).backward()
    for name, param in made.named_parameters():
        torch.testing.assert_close(param.grad, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assert MTPLossLoggingHelper.mean_losses(DEPTH) == pytest.approx([float(mean) for mean in means], rel=1e-5)


def test_nothing_is_predicted_ahead_without_training() -> None:
    made = model().eval()
    tokens, labels, mask, positions = batch()
    made.mtp.forward = None  # type: ignore[assignment]
    assert made(tokens, positions, None, labels=labels, loss_mask=mask).shape == (B, S)
    assert made(tokens, positions, None).shape == (B, S, VOCAB)


# --- shifting --------------------------------------------------------------------------------------------


def test_shifting() -> None:
    rolled, total = roll_tensor(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert rolled.tolist() == [[2, 3, 0], [5, 6, 0]] and int(total) == 16
    with pytest.raises(ValueError, match="earlier places"):
        roll_tensor(torch.zeros(3), shifts=1)
    x = torch.arange(1, 9).view(2, 4)
    assert of_next_tokens(x).tolist() == [[2, 3, 4, 0], [6, 7, 8, 0]]
    borders = torch.tensor([0, 2, 4, 7, 8], dtype=torch.int32)
    ends = ends_of_documents(PackedSeqParams("thd", borders, borders), x)
    assert of_next_tokens(x, ends).tolist() == [[2, 0, 4, 0], [6, 7, 0, 0]]


def shifted_on_ranks(size: int) -> None:
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    group = parallel_state.get_context_parallel_group()
    whole = torch.arange(1, 2 * 4 * size * B + 1).view(B, 8 * size)
    ends = torch.zeros_like(whole, dtype=torch.bool)
    ends[:, 4 * size - 1] = True
    for marks in (None, ends):
        expected = of_next_tokens(whole, marks, None) if marks is None else roll_tensor(whole)[0].masked_fill(ends, 0)
        mine = {"x": whole} | ({} if marks is None else {"ends": marks})
        part = get_batch_on_this_cp_rank(mine, group)
        found = of_next_tokens(part["x"], part.get("ends"), group)
        wanted = get_batch_on_this_cp_rank({"x": expected}, group)["x"]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_shifting_over_context_parallel_ranks(size: int) -> None:
    run_ranks(size, shifted_on_ranks, size)


# --- refusals --------------------------------------------------------------------------------------------


def test_refusals() -> None:
    config = model().config
    spec = get_gpt_layer_local_spec()
    block = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    with pytest.raises(ValueError, match="embed no positions"):
        GPTModel(config, spec, VOCAB, S, mtp_block_spec=block)
    with pytest.raises(ValueError, match=r"has 1 modules for further tokens \(m\), mtp_num_layers is 2"):
        model(pipeline_model_parallel_layout="EttmL")
    with pytest.raises(ValueError, match="between the last t and the L of the last stage"):
        model(pipeline_model_parallel_layout="EtmtmL")
    assert model(pipeline_model_parallel_layout="EttmmL").mtp is not None
