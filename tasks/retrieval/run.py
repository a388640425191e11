"""`--task RETRIEVER-EVAL` (or `ICT-ZEROSHOT-NQ`): how often the passages found for a question have its answer (Lee et
al., arXiv:1906.00300, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron.core import device, parallel_state
from megatron.core.datasets.ict_dataset import framed
from megatron.core.dist_checkpointing.collective import gather_entries
from megatron.core.extensions.mips_index import FaissMIPSIndex
from megatron.inference.forward_only import evaluating
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpointing import load_biencoder_checkpoint
from megatron.training.initialize import close_program
from megatron.training.retrieval.block_data import BlockData
from megatron.training.retrieval.passages import Passage, read_evidence
from megatron.training.settings import ConfigurationError, Source, refuse_unless
from pretrain_ict import model_provider
from tasks.report import report_results
from tasks.retrieval.questions import MATCHES, Question, first_right, read_questions

REPORTED = (1, 5, 20, 100)
"""Numbers of passages among which an answer counts, unless --retriever-report-topk-accuracies says others."""
Sets = dict[str, list[Question]]


def prepare(args: Any) -> Callable[[], None]:
    """What runs the task; questions, passages and their vectors have been read."""
    given = {"dev": args.qa_data_dev, "test": args.qa_data_test}
    refuse_unless(any(given.values()), f"--task {args.task} needs --qa-data-dev or --qa-data-test, the questions")
    sets = {name: read_questions(Path(path), f"--qa-data-{name}") for name, path in given.items() if path}
    for name in ("evidence_data_path", "embedding_path"):
        refuse_unless(getattr(args, name), f"--task {args.task} needs --{name.replace('_', '-')}")
    refuse_unless(args.ict_load or args.load, f"--task {args.task} needs --ict-load, the retriever")
    evidence = {passage.doc_id: passage for passage in read_evidence(Path(args.evidence_data_path))}
    try:
        vectors = BlockData.load(args.embedding_path).embed_data
    except ValueError as error:
        raise ConfigurationError(f"--embedding-path: {error}") from None
    unknown = sorted(vectors.keys() - evidence.keys())
    refuse_unless(
        not unknown, f"--embedding-path {args.embedding_path} has passages {unknown[:5]}, which the evidence has not"
    )
    most = args.faiss_topk_retrievals
    refuse_unless(
        0 < most <= len(vectors), f"--faiss-topk-retrievals ({most}) must be 1 to {len(vectors)}, all there are"
    )
    for name in ("no_load_optim", "no_load_rng"):
        args.put(name, True, Source("program"))
    return partial(_run, args, sets, evidence, vectors)


def _run(args: Any, sets: Sets, evidence: dict[int, Passage], vectors: dict[int, numpy.ndarray]) -> None:
    defaults = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "retrieval"}
    initialize_megatron(parsed_args=args, args_defaults=defaults)
    args = get_args()
    model = get_model(model_provider, wrap_with_ddp=False)
    load_biencoder_checkpoint(model, only_query_model=True, custom_load_path=args.ict_load or args.load)
    index = FaissMIPSIndex(len(next(iter(vectors.values()))), vectors, use_gpu=args.faiss_use_gpu)
    for name, questions in sets.items():
        print_rank_0(f"looking for the answers of {len(questions)} questions in {len(index)} passages")
        places = first_places(model, questions, index, evidence)
        report_results(f"{args.task} {name}", accuracies(places))
    close_program()


def accuracies(places: Sequence[int]) -> dict[str, float]:
    """Share of the questions with an answer among the first k passages."""
    args = get_args()
    ks = args.retriever_report_topk_accuracies or [k for k in REPORTED if k <= args.faiss_topk_retrievals]
    return {f"top-{k} accuracy": sum(place < k for place in places) / len(places) for k in ks}


def first_places(
    model: list[Any], questions: Sequence[Question], index: FaissMIPSIndex, evidence: dict[int, Passage]
) -> list[int]:
    """For each question the place of the first passage with an answer, on every rank. All ranks call this; each data
    parallel rank looks for a part of them."""
    args, group = get_args(), parallel_state.get_data_parallel_group()
    own = range(group.rank(), len(questions), group.size())
    found: dict[int, int] = {}
    for begin in range(0, len(own), args.micro_batch_size):
        batch = own[begin : begin + args.micro_batch_size]
        vectors = embed_questions(model, [questions[place].text for place in batch])
        _, ids = index.search_mips_index(vectors, args.faiss_topk_retrievals, reconstruct=False)
        for place, row in zip(batch, ids.tolist()):
            texts = [evidence[number].text for number in row]
            found[place] = first_right(questions[place], texts, MATCHES[args.faiss_match])
    whole = gather_entries(found, group)
    return [whole[place] for place in range(len(questions))]


def embed_questions(model: list[Any], texts: Sequence[str]) -> torch.Tensor:
    """[texts, p] fp32 on the CPU."""
    tokenizer, length = get_tokenizer(), get_args().retriever_seq_length
    columns = zip(*(framed(tokenizer, length, list(tokenizer.tokenize(text))) for text in texts))
    tokens, mask = (torch.from_numpy(numpy.stack(column)).to(device.current_device()) for column in columns)
    with evaluating(model):
        return model[0](query_tokens=tokens, query_mask=mask)[0].float().cpu()
