"""Continue all prompts of a file, many at once, without a server: one JSON object a line, in the order of the prompts.

    torchrun --nproc-per-node 2 examples/inference/generate_from_file.py --load hf:DIR \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR --tensor-model-parallel-size 2 \
        --prompt-file prompts.txt --output-path texts.jsonl --num-tokens-to-generate 50 --top_p 0.9

The file has a prompt a line, or if its name ends in .jsonl an object with "prompt" a line. Flags of the model, the
checkpoint and the cache are those of tools/run_text_generation_server.py. More ranks than
--tensor-model-parallel-size x --pipeline-model-parallel-size hold copies of the model, which share the prompts; texts
do not depend on how many.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the programs of this clone

from megatron.core import parallel_state
from megatron.core.activity import communicating
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import get_pg_size
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpoint.load import load_run
from megatron.training.errors import exit_at_once_on_error
from pretrain_gpt import model_provider
from tools.run_text_generation_server import add_server_arguments, build_engine, check


def add_file_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = add_server_arguments(parser).add_argument_group("generation from a file")
    group.add_argument("--prompt-file", type=Path, required=True, help="prompts, a line each, or .jsonl")
    group.add_argument("--output-path", type=Path, required=True, help="where the texts are written, as JSON lines")
    parser.set_defaults(num_tokens_to_generate=30, temperature=1.0, top_k=0, top_p=0.0, return_log_probs=False)
    return parser


def read_prompts(path: Path) -> list[str]:
    """Raises ValueError: a line is not an object with a prompt, or there is none."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    if path.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)["prompt"]) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'--prompt-file {path}: each line must be an object with "prompt"') from None
    if not lines:
        raise ValueError(f"--prompt-file {path} has no prompts")
    return lines


Rows = dict[int, dict[str, Any]]
"""Number of a prompt -> its line of the file that is written."""


def own_rows(engine: DynamicInferenceEngine, prompts: list[str], params: SamplingParams) -> Rows:
    """What this copy of the model makes of its part of the prompts. A random text follows the number of its prompt."""
    copy, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    requests = {}
    for number in range(len(prompts)):  # all are checked by all: none is left waiting
        engine.check_prompt(engine.controller.tokenize_prompt(prompts[number]), params.num_tokens_to_generate)
    for number in range(copy, len(prompts), copies):
        requests[number] = engine.add_request(number, prompts[number], sampling_params=params)
    while engine.has_unfinished_requests():
        engine.step()
    rows: Rows = {}
    for number, request in requests.items():
        rows[number] = {"prompt": prompts[number], "text": request.generated_text, "tokens": request.generated_tokens}
        rows[number] |= {"logprobs": request.generated_log_probs} if params.return_log_probs else {}
    return rows


def all_rows(own: Rows) -> list[dict[str, Any]]:
    """Those of all copies, in the order of the prompts. Communicates: a gather of objects over the copies."""
    group = parallel_state.get_data_parallel_group()
    gathered: list[Rows] = [{}] * get_pg_size(group)
    with communicating("all-gather", group, of="texts"):
        torch.distributed.all_gather_object(gathered, own, group=group)
    found = {number: row for rows in gathered for number, row in rows.items()}
    return [found[number] for number in sorted(found)]


def write_texts() -> None:
    initialize_megatron(add_file_arguments)
    args, tokenizer = get_args(), get_tokenizer()
    check(args)
    prompts = read_prompts(args.prompt_file)
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    engine = build_engine(args, model, tokenizer)
    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.num_tokens_to_generate,
        return_log_probs=args.return_log_probs,
    )
    begin = time.perf_counter()
    rows = all_rows(own_rows(engine, prompts, params))
    seconds = time.perf_counter() - begin
    if torch.distributed.get_rank() == 0:
        with args.output_path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    count = sum(len(row["tokens"]) for row in rows)
    print_rank_0(f"{len(rows)} texts, {count} tokens in {seconds:.1f} s: {args.output_path}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_at_once_on_error():
        write_texts()
