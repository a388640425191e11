"""Masks, batches, blends and norms that the training programs share."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import utils
from megatron.training.global_vars import set_args
from tests.worker_pool import run_ranks

EOD = 7

# --- masks ---


def masks_by_definition(
    row: list[int], reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
) -> tuple[list[list[bool]], list[float], list[int]]:
    """Of one sample: an end of document is the last token of its document."""
    length = len(row)
    document = [row[:i].count(EOD) for i in range(length)]
    forbidden = [
        [key > query or (reset_attention_mask and document[key] != document[query]) for key in range(length)]
        for query in range(length)
    ]
    begins = [document.index(document[i]) if reset_position_ids else 0 for i in range(length)]
    weights = [0.0 if eod_mask_loss and token == EOD else 1.0 for token in row]
    return forbidden, weights, [i - begin for i, begin in enumerate(begins)]


SAMPLES = [
    [1, 2, EOD, 3, 4, 5, EOD, 6, 1],
    [EOD, 1, 2, 3, 4, 5, 6, 1, EOD],
    [1, EOD, EOD, EOD, 2, 3, 4, EOD, 5],
    [1, 2, 3, 4, 5, 6, 1, 2, 3],
    [EOD] * 9,
]


@pytest.mark.parametrize("reset_position_ids", [False, True])
@pytest.mark.parametrize("reset_attention_mask", [False, True])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_masks_and_positions(reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool) -> None:
    options = (reset_position_ids, reset_attention_mask, eod_mask_loss)
    tokens = torch.tensor(SAMPLES)
    mask, loss_mask, position_ids = utils.get_ltor_masks_and_position_ids(tokens, EOD, *options)
    assert mask.shape == ((len(SAMPLES) if reset_attention_mask else 1), 1, 9, 9)
    assert (mask.dtype, loss_mask.dtype, position_ids.dtype) == (torch.bool, torch.float32, torch.int64)
    for i, row in enumerate(SAMPLES):
        forbidden, weights, positions = masks_by_definition(row, *options)
        assert mask[i if reset_attention_mask else 0, 0].tolist() == forbidden
        assert loss_mask[i].tolist() == weights
        assert position_ids[i].tolist() == positions
    position_ids[0, 0] = 99  # each sample has positions of its own
    assert position_ids[1, 0] == 0


# --- batches ---

LENGTH, MICRO_BATCH = 6, 2


def settings(**changes: Any) -> SimpleNamespace:
    values = {
        "micro_batch_size": MICRO_BATCH,
        "seq_length": LENGTH,
        "reset_attention_mask": False,
        "mtp_num_layers": None,
        "create_attention_mask_in_dataloader": True,
        "attention_backend": SimpleNamespace(name="auto"),
    }
    return SimpleNamespace(**{**values, **changes})


def sample(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shape = (MICRO_BATCH, LENGTH)
    return {
        "tokens": torch.randint(0, 50, shape, generator=generator),
        "labels": torch.randint(0, 50, shape, generator=generator),
        "position_ids": torch.randint(0, LENGTH, shape, generator=generator),
        "loss_mask": torch.rand(shape, generator=generator),
        "attention_mask": torch.rand(MICRO_BATCH, 1, LENGTH, LENGTH, generator=generator) < 0.5,
    }


def batch_of_rank(tp: int, pp: int, changes: dict[str, Any]) -> dict[str, Tensor | None]:
    """What this rank gets when the first tensor rank of each replica reads a sample of its own."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    set_args(settings(**changes))
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    replica = parallel_state.get_data_parallel_rank()
    return utils.get_batch_on_this_tp_rank(iter([sample(replica)]) if reads else None)


def assert_batch(found: dict[str, Tensor | None], replica: int, keys: list[str]) -> None:
    assert sorted(found) == sorted(sample(0))
    assert sorted(key for key, value in found.items() if value is not None) == sorted(keys)
    torch.testing.assert_close({key: found[key] for key in keys}, {key: sample(replica)[key] for key in keys})


def test_every_tensor_rank_gets_the_batch_of_its_replica() -> None:
    for rank, found in enumerate(run_ranks(4, batch_of_rank, 2, 1, {})):
        assert_batch(found, rank // 2, ["tokens", "position_ids", "labels", "loss_mask"])


def test_stages_get_what_they_need() -> None:
    first, *middle, last = run_ranks(4, batch_of_rank, 1, 4, {})
    assert_batch(first, 0, ["tokens", "position_ids"])
    assert_batch(last, 0, ["labels", "loss_mask"])
    for found in middle:
        assert_batch(found, 0, [])


def test_every_stage_gets_what_tells_documents_apart() -> None:
    first, middle, last = run_ranks(3, batch_of_rank, 1, 3, {"reset_attention_mask": True})
    assert_batch(first, 0, ["tokens", "position_ids"])
    assert_batch(middle, 0, ["tokens"])
    assert_batch(last, 0, ["tokens", "labels", "loss_mask"])
    dense = {"reset_attention_mask": True, "attention_backend": "unfused"}
    for found in run_ranks(2, batch_of_rank, 2, 1, dense):
        assert_batch(found, 0, ["tokens", "position_ids", "labels", "loss_mask", "attention_mask"])


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, False),
        ({"reset_attention_mask": True}, False),
        ({"reset_attention_mask": True, "attention_backend": SimpleNamespace(name="unfused")}, True),
        ({"reset_attention_mask": True, "attention_backend": SimpleNamespace(name="flash")}, False),
        ({"attention_backend": "unfused"}, False),
        (
            {
                "reset_attention_mask": True,
                "attention_backend": "unfused",
                "create_attention_mask_in_dataloader": False,
            },
            False,
        ),
    ],
)
def test_batches_carry_a_dense_mask_only_where_it_is_used(changes: dict[str, Any], dense: bool) -> None:
    assert utils.dense_attention_mask(settings(**changes)) is dense


# --- blends ---


def data_flags(**given: Any) -> SimpleNamespace:
    names = ("data_path", "data_args_path", "per_split_data_args_path")
    names += ("train_data_path", "valid_data_path", "test_data_path")
    return SimpleNamespace(**{**dict.fromkeys(names), **given})


def test_one_blend_for_all_splits(tmp_path: Path) -> None:
    blend = utils.get_blend_and_blend_per_split
    assert blend(data_flags()) == (None, None)
    assert blend(data_flags(data_path=["a"])) == ((["a"], None), None)
    weighted = (["a", "b"], [0.3, 0.7])
    assert blend(data_flags(data_path=["0.3", "a", "0.7", "b"])) == (weighted, None)
    (tmp_path / "args").write_text("0.3 a\n0.7 b\n")
    assert blend(data_flags(data_args_path=str(tmp_path / "args"))) == (weighted, None)


def test_a_blend_for_each_split(tmp_path: Path) -> None:
    blend = utils.get_blend_and_blend_per_split
    weighted = (["a", "b"], [1.0, 2.0])
    flags = data_flags(train_data_path=["1", "a", "2", "b"], test_data_path=["c"])
    assert blend(flags) == (None, [weighted, None, (["c"], None)])
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"train": ["1", "a", "2", "b"], "test": "c"}))
    assert blend(data_flags(per_split_data_args_path=str(file))) == (None, [weighted, None, (["c"], None)])
    file.write_text(json.dumps({"train": "a", "validation": "b"}))
    with pytest.raises(ValueError, match=r"splits.json names \['validation'\]; the splits are train, valid, test"):
        blend(data_flags(per_split_data_args_path=str(file)))


# --- norms and losses over ranks ---


def build_model(tp: int, pp: int, sequence_parallel: bool, tied: bool) -> GPTModel:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        sequence_parallel=sequence_parallel,
        init_method_std=0.5,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=32,
        max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
    )


def params_norm(tp: int, pp: int, sequence_parallel: bool, tied: bool) -> float:
    return utils.calc_params_l2_norm([build_model(tp, pp, sequence_parallel, tied)])


def plain_params_norm(tied: bool) -> float:
    model = build_model(1, 1, False, tied)
    norm = torch.cat([param.detach().flatten() for param in model.parameters()]).double().norm()
    assert utils.calc_params_l2_norm(model) == pytest.approx(float(norm), rel=1e-7)
    return float(norm)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("ranks", "tp", "pp", "sequence_parallel"),
    [(1, 1, 1, False), (2, 2, 1, False), (2, 2, 1, True), (2, 1, 2, False), (4, 2, 2, True), (2, 1, 1, False)],
)
def test_params_norm_counts_every_parameter_once(
    ranks: int, tp: int, pp: int, sequence_parallel: bool, tied: bool
) -> None:
    (expected,) = run_ranks(1, plain_params_norm, tied)
    found = run_ranks(ranks, params_norm, tp, pp, sequence_parallel, tied)
    # Squares are rounded to fp32, 6e-8 each; a parameter counted twice would show in the second digit.
    assert found == [pytest.approx(expected, rel=1e-7)] * ranks


def averaged_losses() -> list[float]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    rank = float(dist.get_rank())
    losses = [torch.tensor(rank, requires_grad=True), torch.tensor([10 * rank])]
    averaged = utils.average_losses_across_data_parallel_group(losses)
    assert not averaged.requires_grad
    assert losses[0].item() == rank
    return averaged.tolist()


def test_losses_are_averaged_over_replicas() -> None:
    assert run_ranks(4, averaged_losses) == [[1.0, 10.0], [2.0, 20.0], [1.0, 10.0], [2.0, 20.0]]


# --- printing ---


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error


def printed() -> tuple[str, str]:
    with captured() as (out, error):
        utils.print_rank_0("first")
        utils.print_rank_last("last")
        utils.warn_rank_0("careful")
    return out.getvalue(), error.getvalue()


def test_printing_on_one_rank() -> None:
    warning = "WARNING: careful\n"
    assert run_ranks(3, printed) == [("first\n", warning), ("", ""), ("last\n", "")]
    assert printed() == ("first\nlast\n", warning)
    assert (utils.rank(), utils.is_last_rank()) == (0, True)
