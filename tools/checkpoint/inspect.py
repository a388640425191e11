"""Look at checkpoints: what is in them, how two differ, whether one is whole, whether it computes what it should.

    python tools/checkpoint/inspect.py ls checkpoints
    python tools/checkpoint/inspect.py diff checkpoints other-checkpoints
    python tools/checkpoint/inspect.py verify checkpoints
    python tools/checkpoint/inspect.py verify checkpoints --against-hf LLAMA

A checkpoint is a folder with a tracker file, or one `iter_*` directory in it, of any format and layout; or `hf:DIR`, a
directory of transformers. The status is 1 if something differs or is damaged.
"""

from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))  # this file's name would hide the standard library's inspect
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(p for p in sys.path if os.path.abspath(p or ".") != _HERE)]

import argparse
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.manifest import read_manifest
from megatron.core.export import HFFolder, NotExpressible
from megatron.training.checkpoint.conversion import find_directory
from megatron.training.checkpoint.find import SHARDED_FORMATS, Found, read_catalog_of, read_common, verify_alone
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.checkpoint.inspection import Contents, open_contents, tensor_differences
from megatron.training.checkpoint.paths import detect_format, saved_iterations
from tools.checkpoint.against_hf import compare_with_hf
from tools.checkpoint.bar import bytes_bar

SHOWN_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("seq_length", "max_position_embeddings", "position_embedding_type", "normalization", "swiglu"),
    *("untie_embeddings_and_output_weights", "padded_vocab_size", "tokenizer_type", "tokenizer_model", "params_dtype"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("world_size", "use_distributed_optimizer", "consumed_train_samples"),
)
"""What `ls` shows unless all arguments are asked for."""


# --- ls -------------------------------------------------------------------------------------------------


def ls(args: argparse.Namespace) -> int:
    """Names, shapes, types, layout, step and arguments."""
    contents = open_contents(args.checkpoint)
    size = sum(t.num_bytes for t in contents.tensors.values())
    print(f"{contents.name}: format {contents.format}, iteration {contents.iteration}")
    others = [n for n in saved_iterations(Path(args.checkpoint)) if n != contents.iteration]
    if others:
        print(f"  other iterations in the folder: {', '.join(map(str, sorted(others)))}")
    names = sorted(contents.arguments) if args.all_args else SHOWN_ARGUMENTS
    for name in names:
        if name in contents.arguments:
            print(f"  {name} = {contents.arguments[name]}")
    print(f"{len(contents.tensors)} tensors, {size / 1e6:,.1f} MB; {len(contents.objects)} objects")
    for name, tensor in sorted(contents.tensors.items()):
        if args.filter is None or args.filter in name:
            print(f"  {name:<90} {str(tensor.dtype).removeprefix('torch.'):<9} {list(tensor.shape)}")
    return 0


# --- diff -----------------------------------------------------------------------------------------------


def diff(args: argparse.Namespace) -> int:
    """What two checkpoints do not have in common."""
    first, second = open_contents(args.a), open_contents(args.b)
    if not (first.stored_alike and second.stored_alike):  # only models can be compared
        first, second = first.of_model(), second.of_model()
    shared = [name for name in first.tensors if name in second.tensors]
    lines = [f"only in {args.a}: {name}" for name in sorted(first.tensors.keys() - second.tensors.keys())]
    lines += [f"only in {args.b}: {name}" for name in sorted(second.tensors.keys() - first.tensors.keys())]
    lines += argument_differences(first, second) if args.args else []
    with bytes_bar("comparing", sum(first.tensors[name].num_bytes for name in shared)) as advance:
        lines += tensor_differences(first, second, shared, args.tolerance, advance)
    for line in lines:
        print(line)
    print(f"{len(shared)} tensors in both, {len(lines)} differences")
    return 1 if lines else 0


def argument_differences(first: Contents, second: Contents) -> list[str]:
    """Arguments that both have, with other values."""
    both = sorted(first.arguments.keys() & second.arguments.keys())
    pairs = [(name, first.arguments[name], second.arguments[name]) for name in both]
    return [f"{name}: {a!r} against {b!r}" for name, a, b in pairs if str(a) != str(b)]


# --- verify ---------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace) -> int:
    """Whether every byte is the one that was written, and, beside a model of transformers, what it computes."""
    problems = damage_of(args.checkpoint)
    for problem in problems:
        print(problem)
    if problems:
        return 1
    print(f"{args.checkpoint}: whole")
    if args.against_hf is None:
        return 0
    difference, what = compare_with_hf(args.checkpoint, Path(args.against_hf))
    good = difference <= args.tolerance
    sign = "OK: " if good else "DIFFERENT: "
    print(f"{sign}{what} of {args.checkpoint} and {args.against_hf} differ by at most {difference:.3g}", end="")
    print(f" (tolerance {args.tolerance:g})")
    return 0 if good else 1


def damage_of(name: str) -> list[str]:
    """What is wrong with a checkpoint; empty if it is whole."""
    directory = hf_directory(name)
    try:
        if directory is not None:
            HFFolder(directory)
            return []
        path = find_directory(name)
        found = Found(path, name, 0, False, False, detect_format(path))
        records = read_manifest(path) or {}
        if not records:
            print(f"{path} has no manifest: only names and sizes can be checked")
        with bytes_bar("verifying", sum(record.size for record in records.values())) as advance:
            problems = verify_alone(found, checksums=True, on_progress=advance)
        if not problems and found.format in SHARDED_FORMATS:
            read_common(found), read_catalog_of(path)
        return problems
    except CheckpointingException as error:
        return [str(error)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command and its options."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        made.set_defaults(run=run)
        return made

    listing = command("ls", ls)
    listing.add_argument("checkpoint")
    listing.add_argument("--all-args", action="store_true", help="show every argument of the run that wrote it")
    listing.add_argument("--filter", help="show tensors with this in their name")
    comparison = command("diff", diff)
    comparison.add_argument("a")
    comparison.add_argument("b")
    comparison.add_argument("--tolerance", type=float, default=0.0, help="largest difference that counts as equal")
    comparison.add_argument("--args", action="store_true", help="compare the arguments of the runs too")
    check = command("verify", verify)
    check.add_argument("checkpoint")
    check.add_argument("--against-hf", metavar="DIR", help="run both models and compare what they compute")
    check.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of logits in fp32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return args.run(args)
    except (CheckpointingException, NotExpressible, OSError) as error:
        print(f"inspect.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
