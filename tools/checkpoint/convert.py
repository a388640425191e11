"""Convert the weights of a model between kinds of checkpoints and parallel sizes.

    python tools/checkpoint/convert.py --model-type GPT --loader llama_mistral --checkpoint-type hf \
        --model-size llama3 --load-dir LLAMA --tokenizer-model LLAMA \
        --saver core --target-tensor-parallel-size 2 --save-dir OUT

Loaders: `core` and `legacy` (checkpoints of this program and of Megatron-LM, any format and layout), `llama_mistral`
(directories of Meta and Hugging Face), `mixtral_hf` (Mixtral's), `hf` (any family of transformers that is known).
Savers: `core`, `legacy`, `hf`.
One process, one parameter at a time: the model need not fit into memory.
"""

from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))  # has an inspect.py, which would hide the standard library's
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(p for p in sys.path if os.path.abspath(p or ".") != _HERE)]

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export import NotExpressible
from megatron.core.export.rank_files import RankSizes
from megatron.training.checkpoint import conversion
from megatron.training.checkpoint.conversion import Source, Target
from tools.checkpoint.bar import bytes_bar

OLD_NAMES = {"megatron": "legacy", "mcore": "core"}
LOADERS = ("core", "legacy", "llama_mistral", "mixtral_hf", "hf")
SAVERS = ("core", "legacy", "hf")
MODEL_SIZES = {
    **dict.fromkeys(("llama2-7B", "llama2-13B", "llama2-70B", "llama2-7Bf", "llama2-13Bf", "llama2-70Bf"), "llama"),
    "llama3": "llama",
    "mistral": "mistral",
    "yi-34B": "llama",
    "qwen2.5": "qwen2",
}
"""--model-size -> model_type of such a directory."""
ONE_FAMILY = {"mixtral_hf": "mixtral"}
"""--loader -> model_type of such a directory."""
NOT_BUILT = {
    "llava": "vision-language models",
    "hf_llava": "vision-language models",
}


def plug_in(known: tuple[str, ...]) -> Callable[[str], str]:
    """Type of an option that names a loader or saver, also by its older name."""

    def parse(name: str) -> str:
        name = OLD_NAMES.get(name, name)
        if name in NOT_BUILT:
            raise argparse.ArgumentTypeError(f"{name} is not built yet ({NOT_BUILT[name]})")
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is unknown: choose from {', '.join(known)}")
        return name

    return parse


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options: those of every conversion, then those of the loader and the saver."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("--model-type", choices=["GPT", "BERT", "T5"], required=True, help="kind of model")
    parser.add_argument("--loader", type=plug_in(LOADERS), default="legacy", help=f"reads: {', '.join(LOADERS)}")
    parser.add_argument("--saver", type=plug_in(SAVERS), default="legacy", help=f"writes: {', '.join(SAVERS)}")
    parser.add_argument("--load-dir", required=True, help="what to convert")
    parser.add_argument("--save-dir", required=True, help="where to write it")
    parser.add_argument("--max-queue-size", type=int, default=50, help="no effect: one process reads and writes")
    parser.add_argument(
        "--no-checking", dest="checking", action="store_false", help="no effect: names are always checked"
    )
    parser.add_argument("--megatron-path", help="no effect: this program's own code is used")
    known, _ = parser.parse_known_args([word for word in (sys.argv[1:] if argv is None else argv) if word not in HELP])
    ADD_LOADER_OPTIONS[known.loader](parser.add_argument_group(f"loader {known.loader}"))
    ADD_SAVER_OPTIONS[known.saver](parser.add_argument_group(f"saver {known.saver}"))
    return parser.parse_args(argv)


HELP = ("-h", "--help")


def add_vocabulary_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--true-vocab-size", type=int, help="words of the vocabulary without padding")
    group.add_argument("--vocab-file", help="file with a word a line, which says how many there are")
    group.add_argument(
        "--loader-transformer-impl", choices=["local", "transformer_engine"], help="no effect: either is read"
    )


def add_own_options(group: argparse._ArgumentGroup) -> None:
    add_vocabulary_options(group)
    choices = ["learned_absolute", "rope"]
    group.add_argument("--position-embedding-type", choices=choices, help="where the checkpoint does not say")


def add_type_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--bf16", action="store_true", help="store weights as bf16")
    group.add_argument("--fp16", action="store_true", help="store weights as fp16")
    group.add_argument("--make-vocab-size-divisible-by", type=int, help="pad the vocabulary to a multiple of this")


def add_llama_options(group: argparse._ArgumentGroup) -> None:
    add_vocabulary_options(group)
    add_type_options(group)
    group.add_argument("--model-size", required=True, choices=list(MODEL_SIZES), help="family and size")
    group.add_argument("--checkpoint-type", required=True, choices=["meta", "hf"], help="whose kind of directory")
    group.add_argument("--tokenizer-model", required=True, help="tokenizer's file or folder")


def add_hf_options(group: argparse._ArgumentGroup) -> None:
    add_vocabulary_options(group)
    add_type_options(group)
    group.add_argument("--tokenizer-model", help="tokenizer's file or folder; default: the one of the directory")


def add_layout_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--target-tensor-parallel-size", type=int, help="default: that of the source, or 1")
    group.add_argument("--target-pipeline-parallel-size", type=int, help="default: that of the source, or 1")
    group.add_argument("--saver-transformer-impl", choices=["local", "transformer_engine"], default="local",
                       help="whose names of norms; this program loads local")  # fmt: skip


def add_core_saver_options(group: argparse._ArgumentGroup) -> None:
    add_layout_options(group)
    group.add_argument("--target-expert-parallel-size", type=int, help="default: that of the source, or 1")
    formats = ["torch", "torch_dist", "safetensors"]
    group.add_argument("--ckpt-format", choices=formats, default="torch", help="torch fits the target sizes only")


def add_hf_saver_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hf-model-type", help="kind of model to write; default: the first that computes the same")


ADD_LOADER_OPTIONS = {
    "core": add_own_options,
    "legacy": add_own_options,
    "llama_mistral": add_llama_options,
    "mixtral_hf": add_hf_options,
    "hf": add_hf_options,
}
ADD_SAVER_OPTIONS = {"core": add_core_saver_options, "legacy": add_layout_options, "hf": add_hf_saver_options}


def load(args: argparse.Namespace) -> Source:
    """What is to be converted, as the options describe it."""
    family = args.model_type.lower()
    if args.loader in ("core", "legacy"):
        source = conversion.load_own(args.load_dir, family)
        if args.position_embedding_type and args.position_embedding_type != source.settings["position_embedding_type"]:
            raise CheckpointingException(
                f"--position-embedding-type {args.position_embedding_type}: the checkpoint has "
                f"{source.settings['position_embedding_type']}"
            )
    else:
        source = load_others(args, family)
    words = args.true_vocab_size
    if words is None and args.vocab_file:
        words = len(Path(args.vocab_file).read_text(encoding="utf-8").splitlines())
    return source if words is None else replace(source, words=words)


def load_others(args: argparse.Namespace, family: str) -> Source:
    """A directory of Meta or of transformers."""
    if args.bf16 and args.fp16:
        raise CheckpointingException("--bf16 and --fp16 exclude each other")
    kind = MODEL_SIZES[args.model_size] if args.loader == "llama_mistral" else ONE_FAMILY.get(args.loader)
    if getattr(args, "checkpoint_type", "hf") == "meta":
        if kind != "llama":
            raise CheckpointingException(f"--checkpoint-type meta with --model-size {args.model_size}: use hf")
        source = conversion.load_meta(args.load_dir, family)
    else:
        source = conversion.load_hf(args.load_dir, family)
        found = conversion.HFFolder(args.load_dir).config["model_type"]
        if kind and found != kind:
            asked = f"--model-size {args.model_size}" if args.loader == "llama_mistral" else f"--loader {args.loader}"
            raise CheckpointingException(f"{asked} is for a {kind}, {args.load_dir} holds a {found}")
    if args.tokenizer_model:
        path = Path(args.tokenizer_model)
        name = "HuggingFaceTokenizer" if path.is_dir() else "Llama2Tokenizer"
        settings = {**source.settings, "tokenizer_type": name, "tokenizer_model": args.tokenizer_model}
        source = replace(source, settings=settings, tokenizer=path if path.is_dir() else path.parent)
    return conversion.in_type(source, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None)


def save(args: argparse.Namespace, source: Source) -> Path:
    """Write it; where it lies then."""
    folder = Path(args.save_dir)
    with bytes_bar(f"converting to {args.saver}", source.num_bytes) as advance:
        if args.saver == "hf":
            return conversion.save_hf(source, Target(folder, on_progress=advance), args.hf_model_type)
        target = Target(
            folder,
            target_sizes(args, source),
            getattr(args, "make_vocab_size_divisible_by", None) or source.settings["make_vocab_size_divisible_by"],
            getattr(args, "ckpt_format", "torch"),
            args.saver_transformer_impl == "transformer_engine",
            advance,
        )
        return conversion.save_own(source, target, legacy=args.saver == "legacy")


def target_sizes(args: argparse.Namespace, source: Source) -> RankSizes:
    """The layout that is asked for; what is not said is as in the source."""
    known = source.settings
    return RankSizes(
        args.target_tensor_parallel_size or known.get("tensor_model_parallel_size") or 1,
        args.target_pipeline_parallel_size or known.get("pipeline_model_parallel_size") or 1,
        getattr(args, "target_expert_parallel_size", None) or known.get("expert_model_parallel_size") or 1,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        written = save(args, load(args))
    except (CheckpointingException, NotExpressible, OSError) as error:
        raise SystemExit(f"convert.py: error: {error}") from error
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
