"""What a run reads: the documents behind each sample of a step, and what each dataset of a blend contributes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.sample_origin import SampleOrigin
from megatron.core.datasets.utils import normalize
from megatron.core.num_microbatches_calculator import build_num_microbatches_calculator
from megatron.training.datasets.data_samplers import build_sampler
from megatron.training.datasets.run_data import RunData

Row = dict[str, Any]


# -- samples of a step -----------------------------------------------------------------------------------


def consumed_before(args: Any, step: int) -> tuple[int, int]:
    """(samples that the steps before `step` take, microbatches of `step` on each rank); the first step is 1.

    Raises:
        ValueError: the run has no such step.
    """
    if not 1 <= step <= args.train_iters:
        raise ValueError(f"step {step}: the run has steps 1 to {args.train_iters}")
    calculator = build_num_microbatches_calculator(
        0,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )
    consumed, per_microbatch = 0, args.micro_batch_size * args.data_parallel_size
    for _ in range(step - 1):
        calculator.update(consumed, consistency_check=False)
        consumed += calculator.get() * per_microbatch
    calculator.update(consumed, consistency_check=True)
    return consumed, calculator.get()


def samples_of_step(data: RunData, step: int) -> list[Row]:
    """Microbatch, data parallel rank and sample number of everything that a training step reads."""
    args = data.args
    consumed, num_microbatches = consumed_before(args, step)
    rows = []
    for rank in range(args.data_parallel_size):
        sampler = build_sampler(
            data.datasets["train"],
            consumed,
            micro_batch_size=args.micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=args.data_parallel_size,
            dataloader_type=args.dataloader_type,
            data_sharding=args.data_sharding,
        )
        endless = itertools.chain.from_iterable(itertools.repeat(sampler))
        for microbatch, samples in enumerate(itertools.islice(endless, num_microbatches)):
            rows += [{"microbatch": microbatch, "rank": rank, "sample": sample} for sample in samples]
    return sorted(rows, key=lambda row: (row["microbatch"], row["rank"]))


def explain_sample(data: RunData, split: str, sample: int, text_length: int | None = None) -> Row:
    """Where a sample comes from, and what it says.

    Args:
        text_length: characters of the text that are kept; None: all.
    """
    if split not in data.datasets:
        raise ValueError(f"there is no data {split!r}; the run has {', '.join(data.datasets)}")
    dataset = data.datasets[split]
    if dataset is None:
        raise ValueError(f"the run has no {split} data")
    if not 0 <= sample < len(dataset):
        raise ValueError(f"sample {sample}: the {split} data has samples 0 to {len(dataset) - 1}")
    origin: SampleOrigin = dataset.origin(sample)
    text = data.tokenizer.detokenize(origin.tokens)
    return {
        "dataset": origin.dataset_path,
        "dataset_id": origin.dataset_id,
        "sample_of_dataset": origin.sample,
        "unit": origin.unit,
        "documents": [
            {"document": part.document, "begin": part.begin, "end": part.end, "epoch": part.epoch}
            for part in origin.parts
        ],
        "text": text if text_length is None else text[:text_length],
    }


# -- shares of a run ---------------------------------------------------------------------------------------


def shares_of_run(data: RunData) -> Iterator[Row]:
    """A row for each dataset of each split: weight asked and achieved, samples, tokens and epochs of the whole run."""
    args = data.args
    evaluations = args.train_iters // args.eval_interval + 1
    wanted = {
        "train": args.train_samples or args.train_iters * args.global_batch_size,
        "valid": evaluations * args.eval_iters * args.global_batch_size,
        "test": args.eval_iters * args.global_batch_size,
    }
    for split, dataset in data.datasets.items():
        if dataset is not None:
            whole = args.full_validation and split.startswith("valid")
            num_wanted = evaluations * len(dataset) if whole else wanted[split.split("_")[0]]
            yield from _shares_of_split(split, dataset, num_wanted, args)


def _shares_of_split(split: str, dataset: Any, num_wanted: int, args: Any) -> Iterator[Row]:
    blended = isinstance(dataset, BlendedDataset)
    sources = dataset.datasets if blended else [dataset]
    weights = normalize(dataset.weights) if blended else [1.0]
    counts = _samples_taken(dataset, num_wanted, args.dataloader_type) if blended else [num_wanted]
    total = sum(counts)
    for source, weight, count in zip(sources, weights, counts):
        per_epoch = source.samples_per_epoch()
        yield {
            "split": split,
            "dataset": source.dataset_path,
            "weight": weight,
            "achieved": count / total if total else 0.0,
            "samples": count,
            "tokens": count * args.seq_length,
            "epochs": count / per_epoch if per_epoch else None,
        }


def _samples_taken(dataset: BlendedDataset, num_wanted: int, dataloader_type: str) -> list[float]:
    """Samples of each dataset among the first `num_wanted`; in random order, their share of whole passes."""
    num_sources = len(dataset.datasets)
    if dataloader_type == "single":
        first = dataset.dataset_index[: min(num_wanted, len(dataset))]
        return numpy.bincount(first, minlength=num_sources).tolist()
    counts = numpy.bincount(dataset.dataset_index, minlength=num_sources)
    return (counts * (num_wanted / len(dataset))).tolist()
