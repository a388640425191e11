"""Embed every block of a data set, or every passage of a table, with a model of pretrain_ict.py.

    python tools/create_doc_index.py --num-layers 12 --hidden-size 768 --num-attention-heads 12 --ict-head-size 128 \
        --seq-length 256 --max-position-embeddings 256 --vocab-file vocab.txt --ict-load checkpoints/ict \
        --data-path corpus_text_sentence --titles-data-path corpus_title_sentence --block-data-path embedded_blocks.pkl

With `--evidence-data-path wiki.tsv --embedding-path embedded.pkl` in place of the last line the passages of a table are
embedded. Under torchrun the passages are spread over the data parallel ranks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the programs and packages beside this folder

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.ict_dataset import ICTDataset, ICTDatasetConfig
from megatron.inference.forward_only import evaluating
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import load_biencoder_checkpoint
from megatron.training.errors import exit_at_once_on_error
from megatron.training.initialize import close_program
from megatron.training.retrieval.indexing import write_index
from megatron.training.retrieval.passages import Blocks, Evidence, Passages, read_evidence
from megatron.training.settings import Source, configuration_errors_end_the_program, refuse_unless
from pretrain_ict import dataset_config, model_provider


def prepared_args() -> argparse.Namespace:
    """The flags, as far as this program has to look at them itself."""
    args = parse_args()
    refuse_unless(args.ict_load or args.load, "--ict-load is missing: the checkpoint of a model of pretrain_ict.py")
    refuse_unless(
        bool(args.block_data_path) != bool(args.embedding_path),
        "give --block-data-path to embed the blocks of --data-path, or --embedding-path to embed the passages of "
        "--evidence-data-path",
    )
    source = "evidence_data_path" if args.embedding_path else "data_path"
    refuse_unless(getattr(args, source), f"--{source.replace('_', '-')} is missing: what to embed")
    if args.block_data_path and args.split is None:
        args.put("split", "1,0,0", Source("program"))
    if args.micro_batch_size is None:
        args.put("micro_batch_size", args.indexer_batch_size, Source("program"))
    for name in ("no_load_optim", "no_load_rng", "exit_on_missing_checkpoint"):
        args.put(name, True, Source("program"))
    return args


def main() -> None:
    with configuration_errors_end_the_program():
        args = prepared_args()
        evidence = None
        if args.evidence_data_path:
            evidence = read_evidence(Path(args.evidence_data_path), args.sample_rate, args.seed)
    defaults = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "retrieval"}
    initialize_megatron(parsed_args=args, args_defaults=defaults)
    args = get_args()
    passages: Passages
    if evidence:
        passages = Evidence(evidence, get_tokenizer(), args.retriever_seq_length)
    else:
        passages = Blocks(only_dataset(dataset_config(args.seq_length)))
    model = get_model(model_provider, wrap_with_ddp=False)
    load_biencoder_checkpoint(model, only_context_model=True, custom_load_path=args.ict_load or args.load)
    with evaluating(model), torch.no_grad():
        write_index(
            lambda tokens, mask: model[0](context_tokens=tokens, context_mask=mask)[1],
            passages,
            Path(args.embedding_path or args.block_data_path),
            batch_size=args.indexer_batch_size,
            log_interval=args.indexer_log_interval,
        )
    close_program()


def only_dataset(config: ICTDatasetConfig) -> ICTDataset:
    """The data set that the flags name, all of it being one split."""
    built: Any = BlendedMegatronDatasetBuilder(ICTDataset, [1, 1, 1], lambda: True, config).build()[0]
    refuse_unless(isinstance(built, ICTDataset), "--data-path names a blend; an index is of one data set")
    return built


if __name__ == "__main__":
    with exit_at_once_on_error():
        main()
