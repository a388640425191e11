"""What the programs of a model family derive and refuse."""

from __future__ import annotations

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.settings import ConfigurationError, Settings

SIZES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48 "
    "--micro-batch-size 2 --train-iters 1 --lr 1e-3"
)
T5 = "--decoder-seq-length 32 --vocab-extra-ids 20 --vocab-file vocab.txt --tokenizer-type BertWordPieceLowerCase"
STAGES = "--encoder-pipeline-model-parallel-size 1 --pipeline-model-parallel-size"


def settings(family: str, flags: str, monkeypatch: pytest.MonkeyPatch, world_size: int = 1) -> Settings:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    args = parse_args(argv=f"{SIZES} {flags}".split())
    validate_args(args, {"model_family": family})
    return args


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("gpt", "--decoder-seq-length 32", "only pretrain_t5.py reads it"),
        ("gpt", "--encoder-pipeline-model-parallel-size 1", "only pretrain_t5.py reads it"),
        ("gpt", "--mask-prob 0.2", "only pretrain_bert.py and pretrain_t5.py reads? it"),
        ("gpt", "--position-embedding-type relative", "only pretrain_t5.py reads it"),
        ("bert", "--position-embedding-type relative", "pretrain_bert.py has learned_absolute, rope"),
        ("bert", "--mask-prob 1.5", r"--mask-prob \(1.5\) must be between 0 and 1"),
        ("bert", "--short-seq-prob -1", r"--short-seq-prob \(-1.0\) must be between 0 and 1"),
        ("bert", "--seq-length 4", r"--seq-length \(4\) must be at least 5"),
        ("t5", f"{T5} --seq-length 2", r"--seq-length \(2\) must be at least 3"),
        ("t5", f"{T5} --position-embedding-type relative --relative-attention-num-buckets 3", "must be at least 4"),
        ("t5", f"{T5} --position-embedding-type relative --relative-attention-max-distance 16", "larger than half"),
        ("bert", "--qk-layernorm", "no meaning for pretrain_bert.py"),
        ("t5", "", "needs --decoder-seq-length"),
        ("t5", "--decoder-seq-length 32", "needs --vocab-extra-ids"),
        ("t5", f"{T5} --context-parallel-size 2", "does not split sequences"),
        ("t5", f"{T5} --group-query-attention", "two stacks of layers"),
        ("t5", f"{T5} --num-virtual-stages-per-pipeline-rank 2", "two stacks of layers"),
        ("t5", f"{T5} --pipeline-schedule zb-v", "one model chunk on each rank"),
        ("t5", f"{T5} --pipeline-schedule gpipe", "needs --pipeline-model-parallel-size of at least 2"),
        ("t5", f"{T5} --position-embedding-type none", "has learned_absolute, rope, relative"),
        ("t5", f"{T5} --encoder-tensor-model-parallel-size 2", "both stacks share the embedding"),
        ("t5", f"{T5} --pipeline-model-parallel-size 2", "--encoder-pipeline-model-parallel-size too"),
        ("t5", f"{T5} --pipeline-model-parallel-split-rank 1", "must leave both stacks some"),
        ("t5", f"{T5} {STAGES} 2 --pipeline-model-parallel-split-rank 1", "say the same"),
        ("t5", f"{T5} {STAGES} 1", r"1 processes .* do not divide by \(--encoder-pipeline.* = 2"),
        ("t5", f"{T5} --max-position-embeddings 31", "is smaller than --seq-length"),
        ("t5", f"{T5} --tokenizer-type NullTokenizer --vocab-size 9", "found NullTokenizer"),
    ],
)
def test_refused(family: str, flags: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings(family, flags, monkeypatch)


def test_stacks_divide_over_their_own_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="--decoder-num-layers 2 does not divide by --pipeline-model-parallel"):
        settings("t5", f"{T5} {STAGES} 4", monkeypatch, world_size=5)
    with pytest.raises(ConfigurationError, match="--decoder-seq-length .31. must be divisible"):
        flags = T5.replace("32", "31")
        settings("t5", f"{flags} --tensor-model-parallel-size 2 --sequence-parallel", monkeypatch, world_size=2)


def test_stages_of_both_ways_to_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    new = settings("t5", f"{T5} {STAGES} 2 --decoder-num-layers 4", monkeypatch, world_size=6)
    old = "--pipeline-model-parallel-size 3 --pipeline-model-parallel-split-rank 1 --decoder-num-layers 4"
    for args in (new, settings("t5", f"{T5} {old}", monkeypatch, world_size=6)):
        assert args.encoder_pipeline_model_parallel_size == args.pipeline_model_parallel_split_rank == 1
        assert (args.pipeline_model_parallel_size, args.transformer_pipeline_model_parallel_size) == (2, 3)
        assert (args.data_parallel_size, args.encoder_num_layers, args.decoder_num_layers) == (2, 2, 4)
