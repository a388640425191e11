"""Re-shard a `torch` checkpoint of a Mamba or hybrid model over other tensor and pipeline parallel sizes.

    python tools/checkpoint/hybrid_conversion.py --load-dir CHECKPOINTS --save-dir OUT --target-tp-size 2

Weights only: a run that goes on from it starts its optimizer anew. (Checkpoints of the formats torch_dist and
safetensors need no conversion: they load into any layout, optimizer included.) Widths are read from the weights; those
that are given are compared with them. The padded vocabulary stays as it is unless --true-vocab-size is given; it must
then be what the run pads to (--make-vocab-size-divisible-by). One process, one parameter at a time.
"""

from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))  # has an inspect.py, which would hide the standard library's
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(p for p in sys.path if os.path.abspath(p or ".") != _HERE)]

import argparse
from dataclasses import replace
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export.rank_files import RankSizes
from megatron.core.ssm.mamba_sizes import MambaSizes
from megatron.training.checkpoint import conversion
from megatron.training.checkpoint.conversion import Source, Target
from tools.checkpoint.bar import bytes_bar

WIDTHS = {
    "d_model": "hidden_size",
    "mamba_d_state": "mamba_state_dim",
    "mamba2_n_groups": "mamba_num_groups",
    "mamba2_head_dim": "mamba_head_dim",
}
"""Option -> the setting that a checkpoint keeps."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load-dir", required=True, help="folder with the checkpoint")
    parser.add_argument("--save-dir", required=True, help="where to write")
    parser.add_argument("--target-tp-size", type=int, default=1, help="tensor parallel size of the result")
    parser.add_argument("--target-pp-size", type=int, default=1, help="pipeline parallel size of the result")
    parser.add_argument(
        "--true-vocab-size", type=int, help="words without padding: the result is padded as a run of its layout would"
    )
    parser.add_argument("--reset-iterations", action="store_true", help="the result starts from iteration 0")
    parser.add_argument("--d-model", type=int, help="width of the model, to be compared with the checkpoint's")
    parser.add_argument("--mamba-version", type=int, default=2, choices=[2], help="there are mixers of Mamba-2 only")
    parser.add_argument("--mamba-d-state", type=int, help="state width, to be compared")
    parser.add_argument("--mamba2-n-groups", type=int, help="groups of a mixer, to be compared")
    parser.add_argument("--mamba2-head-dim", type=int, help="head width of a mixer, to be compared")
    return parser.parse_args(argv)


def require_given_widths(args: argparse.Namespace, source: Source) -> None:
    """Raise `CheckpointingException` if a width that was given is not the checkpoint's."""
    for option, setting in WIDTHS.items():
        given, found = getattr(args, option), source.settings.get(setting)
        if given is not None and given != found:
            raise CheckpointingException(
                f"--{option.replace('_', '-')} {given}: the checkpoint has {found}; leave it out"
            )


def require_shareable(source: Source, ranks: int) -> None:
    """Raise `CheckpointingException` unless the mixers' heads and groups divide over the ranks."""
    settings = source.settings
    names = ("mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "mamba_num_heads")
    try:
        MambaSizes.of(settings["hidden_size"], **{name: settings[name] for name in names}).over_tensor_ranks(ranks)
    except ValueError as error:
        raise CheckpointingException(str(error)) from error


def convert(args: argparse.Namespace) -> Path:
    """Write it; where it lies then."""
    source = conversion.load_own(args.load_dir, "mamba")
    require_given_widths(args, source)
    require_shareable(source, args.target_tp_size)
    if args.true_vocab_size is not None:
        source = replace(source, words=args.true_vocab_size)
    if args.reset_iterations:
        source = replace(source, iteration=0)
    with bytes_bar("re-sharding", source.num_bytes) as advance:
        divisible = source.settings["make_vocab_size_divisible_by"]
        sizes = RankSizes(args.target_tp_size, args.target_pp_size)
        return conversion.save_own(source, Target(Path(args.save_dir), sizes, divisible, on_progress=advance))


def main(argv: list[str] | None = None) -> None:
    try:
        written = convert(parse(argv))
    except (CheckpointingException, OSError) as error:
        raise SystemExit(f"hybrid_conversion.py: error: {error}") from error
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
