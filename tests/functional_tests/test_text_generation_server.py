"""The real server on two ranks, from a checkpoint: the openai client, curl's call, the terminal client, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.browser import Browser
from tests.functional_tests.program import ROOT

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
transformers = pytest.importorskip("transformers")

PROMPT = "The whale"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of Hugging Face over the letters, with a tokenizer that has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    words = {chr(code): code - 32 for code in range(32, 127)} | {"<eod>": 95}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eod>", bos_token="<eod>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(path)
    import torch

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=64, bos_token_id=95, eos_token_id=95
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(8.0 if param.dim() > 1 else 1.0)
    model.save_pretrained(path)
    return path


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, launcher) of a server on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    source = ["--load", f"hf:{folder}", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    server = subprocess.Popen(
        [*command, "tools/run_text_generation_server.py", *source, *flags, "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    said = []
    for line in server.stdout:
        said.append(line)
        if found := re.search(r"serving \S+ at http://(\S+)", line):
            break
    else:
        raise AssertionError("".join(said)[-4000:])
    try:
        yield found[1], server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.communicate()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder, "--tensor-model-parallel-size", "2") as (found, _):
        yield found


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """What transformers writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=95)
    return tokenizer.decode(out[0, ids["input_ids"].size(1) :])


def test_the_openai_client_gets_what_transformers_writes(address: str, expected: str) -> None:
    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none")
    name = client.models.list().data[0].id
    asked = {"model": name, "max_tokens": 12, "temperature": 0}
    assert client.completions.create(prompt=PROMPT, **asked).choices[0].text == expected
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **asked)
    assert answer.choices[0].message.content == expected
    assert [row.token for row in answer.choices[0].logprobs.content] == list(expected)
    stream = client.chat.completions.create(messages=messages, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    with pytest.raises(openai.BadRequestError, match="at most 64 tokens"):
        client.completions.create(prompt=PROMPT, model=name, max_tokens=100)


def test_the_documented_calls_work(address: str, expected: str) -> None:
    body = {"prompts": [PROMPT], "tokens_to_generate": 12, "top_k": 1}
    request = urllib.request.Request(f"http://{address}/api", json.dumps(body).encode(), method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["text"] == [PROMPT + expected]
    run = subprocess.run(
        [sys.executable, "tools/text_generation_cli.py", address],
        input=f"{PROMPT}\nmany\n3\n{PROMPT}\n900\n\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert f"Megatron Response: \n{PROMPT}" in run.stdout and "'many' is not a whole number" in run.stdout
    assert "Error: the prompt has 9 tokens" in run.stdout and "at most 64 tokens" in run.stdout
    run = subprocess.run(
        [sys.executable, "tools/text_generation_cli.py", address, "--stream"],
        input=f"{PROMPT}\n12\n{PROMPT}\n900\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Error 400: the prompt has 9 tokens" in run.stdout and run.stdout.count("Enter prompt: ") == 3


def test_clients_that_come_and_go_leave_nothing_behind(address: str, folder: Path) -> None:
    from benchmarks import serve_load

    with mock.patch.object(serve_load, "LONGEST", 24):
        clients = serve_load.load(address, 8, lambda asked: asked < 5)
    found = serve_load.report(clients)
    assert found["errors"] == [] and found["finished"] + found["left"] == 8 * 5
    assert found["left"] > 0 and found["generated_tokens"] > 0
    assert serve_load.chunks_held(address) == 0
    numbers = serve_load.metrics(address)
    assert numbers["requests_rejected_total"] == 0 and numbers["requests_waiting"] == 0


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beams_are_those_of_transformers(address: str, folder: Path, penalty: float) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")
    wanted = model.generate(
        **ids,
        max_new_tokens=10,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=penalty,
        do_sample=False,
        pad_token_id=95,
        return_dict_in_generate=True,
        output_scores=True,
    )
    body = {"prompts": [PROMPT], "tokens_to_generate": 10, "beam_width": 4, "length_penalty": penalty, "no_log": True}
    request = urllib.request.Request(f"http://{address}/api", json.dumps(body).encode(), method="PUT")
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    texts = tokenizer.batch_decode(wanted.sequences, skip_special_tokens=True)
    assert found["text"] == texts and found["segments"] == [list(text) for text in texts]
    assert found["scores"] == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)


ENTER, RIGHT = ("Enter", 13), ("ArrowRight", 39)


def set_field(page: Browser, name: str, text: str) -> None:
    """As a person would: into the field, over what is there."""
    page.run(f"document.getElementById('{name}').select()")
    page.type(text)


def ask(page: Browser, prompt: str, told: str) -> None:
    """Until the page tells how it ended."""
    set_field(page, "prompt", prompt)
    page.press(*ENTER, ctrl=True)
    page.wait_for(f"document.getElementById('status').textContent.includes('{told}')")


def test_the_page_streams_what_the_model_writes(address: str, expected: str) -> None:
    with Browser() as page:
        page.open(f"http://{address}/")
        page.wait_for("document.getElementById('model').textContent.includes('up to 64 tokens')")
        assert page.run("document.activeElement.id") == "prompt"
        set_field(page, "max_tokens", "12")
        set_field(page, "temperature", "0")
        set_field(page, "top_p", "1")
        page.run(
            "seen = []; new MutationObserver(() => seen.push(document.querySelectorAll('.token').length))"
            ".observe(document.getElementById('output'), {childList: true}), 0"
        )
        ask(page, PROMPT, "ended: length")
        assert page.run("document.getElementById('output').textContent") == PROMPT + expected
        assert page.run("seen.some(count => 0 < count && count < 12)"), "the tokens came all at once"
        page.point_at(".token")
        tip = page.run("document.getElementById('tip').textContent").split("\n")
        assert "<- drawn" in tip[0] and json.dumps(expected[0]) in tip[0] and len(tip) == 5
        page.run("document.getElementById('output').focus()")
        for _ in range(2):
            page.press(*RIGHT)
        assert page.run("document.activeElement === document.querySelectorAll('.token')[1]")
        chat(page, expected)


def chat(page: Browser, expected: str) -> None:
    """A conversation, hotter the second time; what is wrong is said."""
    page.run("document.getElementById('chat').click()")
    for temperature in ("0", "2"):
        set_field(page, "temperature", temperature)
        ask(page, PROMPT, "ended: length")
    words = page.run("messages.map(message => message.role + ': ' + message.content)")
    assert words[:3] == [f"user: {PROMPT}", f"assistant: {expected}", f"user: {PROMPT}"]
    assert words[3] != words[1]
    set_field(page, "max_tokens", "63")
    ask(page, PROMPT, "at most 64 tokens")
    assert page.run("document.getElementById('prompt').value") == PROMPT


@pytest.mark.slow
def test_two_copies_of_the_model_serve_and_stop_together(folder: Path, expected: str) -> None:
    from benchmarks import serve_load

    with served(folder) as (address, launcher):
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none")
        asked = {"model": client.models.list().data[0].id, "max_tokens": 12, "temperature": 0}
        choices = client.completions.create(prompt=[PROMPT] * 4, **asked).choices
        assert [choice.text for choice in choices] == [expected] * 4
        with mock.patch.object(serve_load, "LONGEST", 24):
            clients = serve_load.load(address, 8, lambda asked: asked < 20)
        found = serve_load.report(clients)
        assert found["errors"] == [] and found["finished"] + found["left"] == 8 * 20
        assert serve_load.chunks_held(address) == 0
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            told = re.findall(r'requests_total{replica="(.)"} (\d+)', answer.read().decode())
        assert [copy for copy, _ in told] == ["0", "1"] and min(int(count) for _, count in told) > 40
        launcher.send_signal(signal.SIGINT)
        said, _ = launcher.communicate()
        assert "stopped" in said and said.count("Traceback (most recent call last)") == 1, said  # the launcher's
