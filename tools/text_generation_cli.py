"""Talk to a text generation server from a terminal: a prompt, how many tokens, what the model writes, again and again.

    python tools/text_generation_cli.py localhost:5000

An address of the whole route (http://host:port/api) works too. An empty prompt, end-of-file or Ctrl-C ends it. Lines
can be edited, and earlier ones recalled, also those of former times, where Python has readline. With --stream the text
comes as it is written; Ctrl-C then stops the text, and not the program.
"""

import argparse
import atexit
import contextlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

try:
    import readline  # input() edits lines with it
except ImportError:
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 1000


def remember_lines(path: Path) -> None:
    """Recall the lines of former times; those of this one are kept when the program ends."""
    if readline is None:
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)

    def keep() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(keep)


def api_url(address: str) -> str:
    """HOST:PORT, or an address that has all."""
    url = address if "://" in address else f"http://{address}"
    return url if url.rstrip("/").endswith("/api") else f"{url.rstrip('/')}/api"


def ask(url: str, prompt: str, num_tokens: int, key: str | None = None) -> str:
    """What to show: the text, or why there is none."""
    body = json.dumps({"prompts": [prompt], "tokens_to_generate": num_tokens}).encode()
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, body, headers, method="PUT")
    try:
        with urllib.request.urlopen(request) as answer:
            status, found = answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        status, found = error.code, _read_error(error)
    except OSError as error:
        return f"Error: {url} cannot be reached: {getattr(error, 'reason', error)}"
    if isinstance(found, dict) and "text" in found:
        return f"Megatron Response: \n{found['text'][0]}"
    if isinstance(found, dict):
        found = found.get("message", found)
    return f"Error: {found}" if status == 200 else f"Error {status}: {found}"


def stream(url: str, prompt: str, num_tokens: int, key: str | None = None) -> Iterator[str]:
    """The text in pieces as they are written, or why there is none."""
    body = json.dumps({"prompt": prompt, "max_tokens": num_tokens, "stream": True}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url.removesuffix('/api')}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    yield event["choices"][0]["text"] if "choices" in event else f"\nError: {event['error']['message']}"
    except urllib.error.HTTPError as error:
        found = _read_error(error)
        yield f"Error {error.code}: {found['error']['message'] if isinstance(found, dict) else found}"
    except OSError as error:
        yield f"Error: {url} cannot be reached: {getattr(error, 'reason', error)}"


def show(pieces: Iterator[str]) -> None:
    """Each as it comes; Ctrl-C leaves the others out."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()


def _read_error(error: urllib.error.HTTPError) -> object:
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_number(words: str) -> int | None:
    """A whole number from the terminal; asks again until it gets one. None at the end."""
    while True:
        line = input(words).strip()
        if not line:
            return None
        if line.isdecimal():
            return int(line)
        print(f"{line!r} is not a whole number")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", metavar="HOST:PORT", help="where tools/run_text_generation_server.py listens")
    parser.add_argument("--api-key", help="key that the server asks for")
    parser.add_argument("--stream", action="store_true", help="show the text as it is written")
    parser.add_argument(
        "--history", type=Path, default=Path.home() / ".text_generation_history", help="file of earlier lines"
    )
    args = parser.parse_args()
    if sys.stdin.isatty():
        remember_lines(args.history)
    url = api_url(args.address)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while prompt := input("Enter prompt: "):
            number = read_number("Enter number of tokens to generate: ")
            if number is None:
                break
            if args.stream:
                show(stream(url, prompt, number, args.api_key))
            else:
                print(ask(url, prompt, number, args.api_key))
        return 0
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
