"""The server of T5 models, from a directory of transformers: its texts are theirs; a prompt does not go on."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.functional_tests.program import run_program
from tests.worker_pool import run_ranks

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
transformers = pytest.importorskip("transformers")

PROMPTS = ["The whale", "a", "Call me Ishmael. Some years ago"]
NEW = 9


def make(folder: Path) -> None:
    """A random T5 over the letters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = {"<pad>": 0, "</s>": 1} | {chr(code): code - 30 for code in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        num_heads=4,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(97, 32))  # made with the embedding's
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(2.0)
    model.save_pretrained(folder)


def their_texts(folder: Path) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        row = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)[0, 1:]
        texts.append(tokenizer.decode(row))
    return texts


def ask(address: str, route: str, body: dict[str, Any]) -> tuple[int, Any]:
    """(status, answer)."""
    method = "PUT" if route == "/api" else "POST"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + route, json.dumps(body).encode(), headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def answers(address: str) -> dict[str, Any]:
    """What a client sees."""
    legacy = {"prompts": PROMPTS, "tokens_to_generate": NEW, "top_k": 1, "logprobs": True}
    asked = {"prompt": PROMPTS, "max_tokens": NEW, "temperature": 0, "logprobs": 1}
    with urllib.request.urlopen(address + "/metrics") as metrics:
        told = metrics.read().decode()
    return {
        "legacy": ask(address, "/api", legacy),
        "openai": ask(address, "/v1/completions", asked),
        "older": ask(address, "/completions", {"prompt": PROMPTS, "max_tokens": NEW, "top_k": 1}),
        "echo": ask(address, "/v1/completions", asked | {"echo": True}),
        "older echo": ask(address, "/completions", {"prompt": PROMPTS, "max_tokens": 0, "echo": True}),
        "beams": ask(address, "/api", {"prompts": PROMPTS[:1], "tokens_to_generate": 3, "beam_width": 2}),
        "long": ask(address, "/v1/completions", {"prompt": "a" * 5000, "max_tokens": 1}),
        "much": ask(address, "/v1/completions", {"prompt": "a", "max_tokens": 16}),
        "metrics": told,
    }


def serve_and_ask(folder: str) -> dict[str, Any]:
    """The program, which is asked and then stopped by another thread."""
    from megatron.inference.serving import http
    from megatron.inference.serving.loop import EngineLoop

    servers: list[Any] = []
    found: dict[str, Any] = {}
    server_class, run = http.HttpServer, EngineLoop.run

    def keep(*args: Any) -> Any:
        servers.append(server_class(*args))
        return servers[-1]

    def run_and_be_asked(loop: EngineLoop) -> None:
        def client() -> None:
            try:
                found.update(answers(f"http://127.0.0.1:{servers[0].port}"))
            finally:
                loop.stop()

        thread = threading.Thread(target=client)
        thread.start()
        run(loop)
        thread.join()

    flags = f"--load hf:{folder} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"
    flags += " --max-position-embeddings 64 --decoder-seq-length 16 --port 0"
    with mock.patch.object(http, "HttpServer", keep), mock.patch.object(EngineLoop, "run", run_and_be_asked):
        run_program("tools/run_t5_text_generation_server.py", flags.split())
    return found


def test_a_t5_is_served(tmp_path: Path) -> None:
    make(tmp_path)
    expected = their_texts(tmp_path)
    assert len(set(expected)) == 3
    (found,) = run_ranks(1, serve_and_ask, str(tmp_path))
    status, legacy = found["legacy"]
    assert status == 200 and legacy["text"] == expected
    assert [len(row) for row in legacy["tokens"]] == [len(row) for row in legacy["logprobs"]]
    status, openai = found["openai"]
    assert status == 200 and [choice["text"] for choice in openai["choices"]] == expected
    assert all(len(choice["logprobs"]["tokens"]) <= NEW for choice in openai["choices"])
    status, older = found["older"]
    assert status == 200 and [choice["text"] for choice in older["choices"]] == expected
    for row, choice in enumerate(older["choices"]):
        assert choice["logprobs"]["tokens"] == legacy["segments"][row]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(legacy["logprobs"][row], abs=1e-4)
    for name in ("echo", "older echo", "beams"):
        status, told = found[name]
        assert status == (200 if name == "beams" else 400) and "this one answers them" in str(told), told
    for name, words in (("long", "the prompt has 5001 tokens"), ("much", "16 more were asked for")):
        status, told = found[name]
        assert status == 400 and words in str(told), told
    assert "megatron_passes_total" in found["metrics"] and "chunks" not in found["metrics"]
