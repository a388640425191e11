"""The offline program: the texts of a file's prompts in their order, however many copies of the model share them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.functional_tests.program import run_program
from tests.worker_pool import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

PROMPTS = ["3 14 15", "9", "26 5 35 8 9", "7 9 32", "38"]


def lines(folder: Path, prompts: Path, world_size: int) -> list[dict]:
    out = folder / f"{world_size}.jsonl"
    flags = f"--load hf:{folder} --tokenizer-type NullTokenizer --vocab-size 100 --max-position-embeddings 64"
    flags += f" --prompt-file {prompts} --output-path {out} --num-tokens-to-generate 6 --top_p 0.9 --return-log-probs"
    run_ranks(world_size, run_program, "examples/inference/generate_from_file.py", flags.split())
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_copies_share_the_prompts_of_a_file(tmp_path: Path) -> None:
    from tests.interop.hf_models import VOCAB, make

    assert VOCAB == 101
    make("llama", tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    alone, shared = (lines(tmp_path, prompts, world_size) for world_size in (1, 2))
    assert [row["prompt"] for row in shared] == PROMPTS
    for one, other in zip(alone, shared, strict=True):
        assert one["tokens"] == other["tokens"] and one["text"] == other["text"] and len(one["tokens"]) == 6
        assert other["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
