"""A text generation server under load: many clients that ask, read what is streamed, and sometimes go away.

    OMP_NUM_THREADS=1 python benchmarks/serve_load.py --clients 64 --seconds 120 \
        --output benchmarks/results/serve_load.json

The server is the real program, with a small model that this makes (4 layers, hidden size 128, random weights), on this
machine alone. Clients run in this process and share the machine with it. Each asks again as soon as it has its answer:
prompts of 1 to 60 tokens, 1 to 60 more, streamed; one of ten goes away after the first token.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import write_result

MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
    --micro-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 1000
""".split()
TRAIN = "--global-batch-size 1 --lr 1e-3 --mock-data --num-workers 0 --eval-iters 0 --train-iters 1 --save-interval 1"
LONGEST = 60


@dataclass
class Client:
    """What one client has seen."""

    number: int
    finished: int = 0
    left: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)

    def ask(self, address: str, rng: random.Random) -> None:
        """One request, read to its end unless the client loses patience."""
        prompt = [rng.randrange(90) for _ in range(rng.randint(1, LONGEST))]
        body = {"prompt": prompt, "max_tokens": rng.randint(1, LONGEST), "stream": True, "logprobs": 0}
        leaves = rng.random() < 0.1
        connection = http.client.HTTPConnection(address, timeout=300)
        begin = time.monotonic()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self.errors.append(f"{response.status}: {response.read()[:200].decode()}")
                return
            self._read(response, begin, leaves)
        except OSError as error:
            self.errors.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, begin: float, leaves: bool) -> None:
        for count, line in enumerate(line for line in response if line.startswith(b"data: ")):
            if line.startswith(b"data: [DONE]"):
                self.finished += 1
                return
            if count == 0:
                self.first_token_seconds.append(time.monotonic() - begin)
                if leaves:
                    self.left += 1
                    return
            event = json.loads(line[6:])
            if "error" in event:
                self.errors.append(event["error"]["message"])
                return
            self.tokens += len(event["choices"][0]["logprobs"]["tokens"])
        self.errors.append("the stream broke off")


def load(address: str, num_clients: int, goes_on: Callable[[int], bool]) -> list[Client]:
    """Clients that ask as long as `goes_on(requests so far)`."""
    clients = [Client(number) for number in range(num_clients)]

    def run(client: Client) -> None:
        rng, asked = random.Random(client.number), 0
        while goes_on(asked):
            client.ask(address, rng)
            asked += 1

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def metrics(address: str) -> dict[str, float]:
    """What /metrics tells, of all copies of the model together."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    found: dict[str, float] = defaultdict(float)
    for name, value in rows:
        found[name.removeprefix("megatron_").partition("{")[0]] += float(value)
    return dict(found)


def chunks_held(address: str, patience: float = 30) -> int:
    """Chunks that are neither free nor kept only as the beginning of texts, when no request is left."""
    end = time.monotonic() + patience
    while True:
        found = metrics(address)
        held = int(found["chunks"] - found["chunks_free"] - found["chunks_remembered"])
        if held == found["requests_running"] == found["requests_waiting"] == 0 or time.monotonic() > end:
            return held
        time.sleep(0.1)


def report(clients: list[Client]) -> dict[str, Any]:
    """Of all clients together."""
    finished = [client.finished for client in clients]
    waits = sorted(wait for client in clients for wait in client.first_token_seconds)
    return {
        "clients": len(clients),
        "finished": sum(finished),
        "left": sum(client.left for client in clients),
        "errors": [error for client in clients for error in client.errors],
        "generated_tokens": sum(client.tokens for client in clients),
        "finished_per_client": {"least": min(finished), "most": max(finished)},
        "first_token_seconds": {
            "median": round(statistics.median(waits), 4),
            "p99": round(waits[int(0.99 * (len(waits) - 1))], 4),
            "most": round(waits[-1], 4),
        },
    }


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def start_server(folder: str) -> tuple[subprocess.Popen[str], str]:
    """(process, address) of a server of a model that is made in `folder`."""
    program = [sys.executable, "pretrain_gpt.py", *MODEL, *TRAIN.split(), "--save", folder]
    subprocess.run(program, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    program = [sys.executable, "tools/run_text_generation_server.py", *MODEL, "--load", folder, "--port", "0"]
    server = subprocess.Popen([*program, "--cache-gb", "0.05"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"serving \S+ at http://(\S+)", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()  # or it would stop when the pipe is full
            return server, found[1]
    raise RuntimeError(f"the server has ended with {server.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        server, address = start_server(folder)
        try:
            memory = {"before": resident_mib(server.pid)}
            half = threading.Timer(args.seconds / 2, lambda: memory.update(half=resident_mib(server.pid)))
            half.start()
            end = time.monotonic() + args.seconds
            result = report(load(address, args.clients, lambda asked: time.monotonic() < end))
            half.join()
            memory["end"] = resident_mib(server.pid)
            result["seconds"] = args.seconds
            result["chunks_held_at_the_end"] = chunks_held(address)
            result["server_memory_mib"] = {name: round(value, 1) for name, value in memory.items()}
            result["server"] = metrics(address)
        finally:
            server.send_signal(signal.SIGINT)
            result["exit_code"] = server.wait(30)
    print(json.dumps(result, indent=1))
    if args.output:
        write_result(args.output, load=result)


if __name__ == "__main__":
    main()
