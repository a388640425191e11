"""Say how much memory a training command would need on its most loaded rank, without starting it.

    WORLD_SIZE=64 python tools/report_theoretical_memory.py --tensor-model-parallel-size 8 ... --vocab-size 50257

takes the flags of a training command; the number of processes comes from WORLD_SIZE, as a launcher would set it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.arguments import parse_args, validate_args
from megatron.training.settings import ConfigurationError
from megatron.training.theoretical_memory_usage import report_theoretical_memory
from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.tokenizer import vocab_size_with_padding


def main() -> None:
    args = parse_args()
    try:
        validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
        if args.is_hybrid_model:
            raise ConfigurationError("the formulas do not cover hybrid models")
        if args.padded_vocab_size is None:
            words = args.vocab_size or build_tokenizer(args).vocab_size
            args.padded_vocab_size = vocab_size_with_padding(
                words, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
            )
    except ConfigurationError as error:
        raise SystemExit(str(error)) from None
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    print(report_theoretical_memory(args, num_microbatches, verbose=True), end="")


if __name__ == "__main__":
    main()
