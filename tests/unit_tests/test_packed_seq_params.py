"""Borders of documents in a microbatch."""

from __future__ import annotations

import torch

from megatron.core.packed_seq_params import PackedSeqParams


def test_borders_lie_behind_each_end_of_document_and_between_samples() -> None:
    tokens = torch.tensor([[1, 0, 2, 3], [4, 5, 6, 0], [0, 0, 7, 8]])
    packed = PackedSeqParams.from_documents(tokens, end_of_document=0)
    assert packed.cu_seqlens_q.tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.cu_seqlens_kv is packed.cu_seqlens_q
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 4
    assert packed.qkv_format == "thd"


def test_without_documents_only_samples_are_apart() -> None:
    packed = PackedSeqParams.from_documents(torch.ones(2, 5, dtype=torch.int64), end_of_document=0)
    assert packed.cu_seqlens_q.tolist() == [0, 5, 10]
